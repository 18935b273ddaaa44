"""Weights & Biases: the records of a run as curves, with one section of panels for each layer.

W&B draws scalars and histograms over steps. metrics.jsonl has more, such as every head and every singular value. Of a list over heads,
W&B gets one or two numbers for each layer (`OVER_HEADS`); of a list over depths, one number for each layer; of a spectrum, its extremes
and a histogram. The part of a name before the first slash is the section of panels:

==================  ===============================================================================
train, val          losses, learning rates, speed; ``val/full/loss`` is the loss on the whole split
probe               extremes, such as ``probe/largest_logit``
probe/stream        turns of the stream: ``turn_attn/00`` by the attention of block 0, ``size/03`` after three sublayers, ``path``
layer_03/attn       ``logit_max``, ``entropy``, ... of layer 3 (``h.3`` in a parameter's name)
layer_03/stream     ``mean_cosine``, ``effective_rank``, ... of the stream after layer 3
scales/alpha_attn   ``layer_03/mean``, ``layer_03/greatest``, ... of that learned scale
layer_03/attn/c_attn  ``sigma_max``, ``sigma_min``, ... of that matrix; ``certificate/feas`` of its last step
embedding/stream    the stream before the first layer
==================  ===============================================================================
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from training.files import write_whole
from training.log import METRICS_FILE

WANDB_RUNS_FILE = "wandb_runs.json"
_LONGEST_NAME, _LONGEST_TAG = 128, 64  # of W&B, in characters

_logger = logging.getLogger(__name__)

Curve = tuple[str, float | str | list[float]]
"""The name of a curve, and its next point or the numbers of a histogram."""


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


OVER_HEADS: dict[str, dict[str, Callable[[Sequence[float]], float]]] = {
    "logit_max": {"logit_max": max},
    "logit_p999": {"logit_p999": max},
    "entropy": {"entropy": _mean, "entropy_min": min},
    "saturated": {"saturated": _mean, "saturated_max": max},
    "jacobian": {"jacobian": _mean},
    "qk_norm_product": {"qk_norm_product": max},
    "qk_product_norm": {"qk_product_norm": max},
    "recovery": {"recovery_min": min},
}
"""For a field that a probe measures for every head: the names of its curves, and for each the function over the heads of a layer."""


class WandbSink:
    """Sends the records to Weights & Biases. If W&B cannot start, there is one warning, and training continues.

    ``mode`` is "online", "offline" (needs no account) or "disabled". ``directory`` is that of the run; ``wandb_runs.json`` in it has
    the ids of its W&B runs. With ``resume=True``, an online run is continued under its id. An offline run cannot be continued: a new
    one with the same group and name is started. It receives the records of ``history``, those before the resume, so that it shows the
    whole curve; the directories of the earlier offline runs are moved to ``wandb_earlier``, so that ``wandb sync`` uploads one run.
    Its config lists the earlier ids as ``continues``. The x-axis is our ``step``, because the counter of W&B starts at 0 when a run
    is resumed. ``tags`` are texts, by which W&B's table is filtered.
    """

    def __init__(
        self,
        *,
        mode: Literal["online", "offline", "disabled"],
        project: str,
        group: str | None,
        name: str,
        config: Mapping[str, Any],
        directory: str | Path,
        resume: bool = False,
        history: Iterable[dict[str, Any]] = (),
        tags: Sequence[str] = (),
    ):
        self._run: Any = None
        if mode == "disabled":
            return
        about: dict[str, Any] = {"mode": mode, "project": project, "group": group, "name": name[:_LONGEST_NAME]}
        about["tags"] = [tag[:_LONGEST_TAG] for tag in tags]
        try:
            continued = self._start(about, config, Path(directory), resume)
            for record in () if continued else history:
                self.record(record)
        except Exception as error:
            _logger.warning(
                "W&B did not start (%s); training continues without it, and %s has all records. "
                "Install wandb and run `wandb login`, or choose logger.mode=offline or logger.mode=disabled",
                " ".join(str(error).split()) or type(error).__name__,
                METRICS_FILE,
            )

    def _start(self, about: dict[str, Any], config: Mapping[str, Any], directory: Path, resume: bool) -> bool:
        """Start a run, or continue one; returns whether W&B has its earlier records."""
        import wandb  # here, because the import takes a second, and it may not be installed

        mode = about["mode"]
        ids_file = directory / WANDB_RUNS_FILE
        earlier = json.loads(ids_file.read_text()) if resume and ids_file.exists() else []
        # An offline run is uploaded later under its own id, so it must not be continued online.
        # Nor an online one that lacks the records of an offline one after it: then a new run gets the whole curve.
        continued = mode == "online" and bool(earlier) and earlier[-1]["mode"] == "online"
        # The agent of `wandb sweep` chooses the id and expects the run under it.
        fresh_id = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
        run_id = earlier[-1]["id"] if continued else fresh_id
        links = [run["id"] for run in earlier if run["id"] != run_id]
        if resume:
            _set_aside([run["id"] for run in earlier if run["mode"] == "offline"], directory)
        self._run = wandb.init(
            **about,
            id=run_id,
            resume="allow" if mode == "online" else None,
            config={**config, "continues": links} if links else dict(config),
            dir=str(directory),
            reinit="create_new",
            settings=_settings(wandb, mode),
        )
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        self._run.define_metric("val/loss", step_metric="step", summary="min")
        if not continued:
            write_whole(ids_file, json.dumps([*earlier, {"id": run_id, "mode": mode}]))
        return continued

    def record(self, rec: dict[str, Any]) -> None:
        """Log the numbers of a record under the names of ``flatten``, lists as histograms."""
        if self._run is None:
            return
        import wandb

        payload: dict[str, Any] = {"step": rec["step"]}
        for key, value in flatten(rec):
            if not isinstance(value, list):
                payload[key] = value
            elif finite := [number for number in value if math.isfinite(number)]:
                payload[key] = wandb.Histogram(finite)
        self._run.log(payload)

    def close(self) -> None:
        """Finish the W&B run, which uploads or writes its buffer."""
        if self._run is not None:
            run, self._run = self._run, None
            run.finish()


def _set_aside(ids: Sequence[str], directory: Path) -> None:
    """Move the directories of offline runs out of the folder that `wandb sync` uploads."""
    for path in (path for run in ids for path in (directory / "wandb").glob(f"offline-run-*-{run}")):
        (directory / "wandb_earlier").mkdir(exist_ok=True)
        path.rename(directory / "wandb_earlier" / path.name)


def _settings(wandb: Any, mode: str) -> Any:
    """W&B's settings; all times in seconds."""
    return wandb.Settings(
        console="off",  # the progress bar uses the console
        silent=mode == "offline",
        init_timeout=60,
        login_timeout=30,  # otherwise it waits for a key forever
        finish_timeout=20,  # a stopped run has half a minute; `wandb sync` uploads the rest later
    )


def flatten(rec: Mapping[str, Any]) -> Iterator[Curve]:
    """Yield the curves of a record: ``("layer_00/attn/c_attn/sigma_max", 1.0)``.

    Of a probe, a list over layers and heads, or over depths, becomes one curve for each layer; of learned scales, a list over layers
    does. Any other non-empty list of numbers is yielded as a list, for a histogram. Dicts become paths; None is left out. For a list
    ``sigma`` of singular values, ``sigma_max``, ``sigma_min`` and ``stable_rank`` = Σσ²/σ_max² are yielded too.
    """
    fields = {key: value for key, value in rec.items() if key not in ("kind", "step", "name")}
    if rec["kind"] == "probe":
        yield from _probe(fields)
    elif rec["kind"] in ("spectra", "certificate", "update") and isinstance(rec.get("name"), str):
        place = matrix_place(rec["name"])
        yield from _fields(fields, place if rec["kind"] == "spectra" else f"{place}/{rec['kind']}")
    elif rec["kind"] == "scales":
        yield from _scales(fields, f"scales/{rec['name']}")
    else:
        yield from _fields(fields, {"eval": "val", "full_eval": "val/full"}.get(rec["kind"], rec["kind"]))


def matrix_place(name: str) -> str:
    """The start of the names of a parameter's curves.

    >>> matrix_place("transformer.h.3.attn.c_attn.weight")
    'layer_03/attn/c_attn'
    """
    parts = name.removesuffix(".weight").split(".")
    layer = re.search(r"(?:^|\.)h\.(\d+)\.", name)
    if layer is None:
        return "/".join(["weights", *parts])
    return "/".join([f"layer_{int(layer[1]):02d}", *parts[parts.index("h") + 2 :]])


def _probe(fields: Mapping[str, Any]) -> Iterator[Curve]:
    for key, value in fields.items():
        if isinstance(value, Mapping):  # lists over blocks or sublayers: a curve for each
            for name, item in value.items():
                numbers = (
                    {f"{name}/{i:02d}": number for i, number in enumerate(item)}
                    if isinstance(item, list)
                    else {name: item}
                )
                yield from _fields(numbers, f"probe/{key}")
            continue
        if not isinstance(value, list):
            yield from _fields({key: value}, "probe")
            continue
        for i, item in enumerate(value):
            if isinstance(item, list):  # one number for each head
                sound = not any(map(math.isnan, item))
                for curve, reduce in OVER_HEADS.get(key, {key: _mean}).items():
                    yield f"layer_{i:02d}/attn/{curve}", reduce(item) if sound else math.nan
            else:  # one number for each depth; the first is before any layer
                yield f"{f'layer_{i - 1:02d}' if i else 'embedding'}/stream/{key}", item


def _scales(fields: Mapping[str, Any], prefix: str) -> Iterator[Curve]:
    for key, value in fields.items():
        if isinstance(value, list):  # one number for each layer
            for i, number in enumerate(value):
                yield f"{prefix}/layer_{i:02d}/{key}", number
        else:
            yield f"{prefix}/{key}", value


def _fields(fields: Mapping[str, Any], prefix: str) -> Iterator[Curve]:
    for key, value in fields.items():
        path = f"{prefix}/{key}"
        if isinstance(value, Mapping):
            yield from _fields(value, path)
        elif isinstance(value, list):
            if not value or not all(isinstance(item, (int, float)) for item in value):
                continue
            yield path, value
            if key == "sigma":
                largest = max(value)
                yield f"{path}_max", largest
                yield f"{path}_min", min(value)
                yield f"{prefix}/stable_rank", sum((s / largest) ** 2 for s in value) if largest > 0 else 0.0
        elif value is not None:
            yield path, value
