"""Weights & Biases: the records of a run as curves, one section of panels a layer.

W&B draws scalars and histograms over steps. metrics.jsonl holds more, such as every head and every singular value: of what is a list
over heads, W&B is sent one or two numbers a layer (`OVER_HEADS`), of what is a list over depths one a layer, and of a spectrum its
extremes and a histogram. W&B makes a section of panels of what stands before the first slash:

==================  ===============================================================================
train, val          losses, learning rates, speed; ``val/full/loss`` is that of the whole split
probe               the probe's summary, such as ``probe/largest_logit``
layer_03/attn       ``logit_max``, ``entropy``, ... of layer 3 (``h.3`` in a parameter's name)
layer_03/stream     ``mean_cosine``, ``effective_rank``, ... of the stream after layer 3
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from training.log import METRICS_FILE

WANDB_RUNS_FILE = "wandb_runs.json"
_LONGEST_NAME = 128  # characters of a name that W&B takes

_logger = logging.getLogger(__name__)

Curve = tuple[str, float | str | list[float]]
"""The name of a curve and its next point, or the numbers of a histogram."""


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
"""What is sent of a field that a probe measures for every head of every layer: curve → what is taken over a layer's heads."""


class WandbSink:
    """Shows the records in Weights & Biases. Whatever keeps W&B from starting costs one warning and nothing else.

    ``mode`` is "online", "offline" (needs no account) or "disabled". ``directory`` is that of the run; the ids of its
    W&B runs stand there in ``wandb_runs.json``. With ``resume=True`` an online run is continued under its id; offline,
    where W&B cannot append, a second one of the same group and name is begun and its config lists the earlier ids under
    ``continues``. The x-axis is our ``step``: W&B's own counter starts again when a run is resumed.
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
    ):
        self._run: Any = None
        if mode == "disabled":
            return
        try:
            self._start(mode, project, group, name, config, Path(directory), resume)
        except Exception as error:
            _logger.warning(
                "W&B did not start (%s); training goes on without it and %s holds everything. "
                "Install wandb and run `wandb login`, or choose logger.mode=offline or logger.mode=disabled",
                " ".join(str(error).split()) or type(error).__name__,
                METRICS_FILE,
            )

    def _start(
        self,
        mode: Literal["online", "offline", "disabled"],
        project: str,
        group: str | None,
        name: str,
        config: Mapping[str, Any],
        directory: Path,
        resume: bool,
    ) -> None:
        import wandb  # here, because importing it takes a second and it may be absent

        directory.mkdir(parents=True, exist_ok=True)
        ids_file = directory / WANDB_RUNS_FILE
        earlier = json.loads(ids_file.read_text()) if resume and ids_file.exists() else []
        # An offline half is uploaded later under its own id; continuing it online would make two writers of one run.
        online = [run["id"] for run in earlier if run["mode"] == "online"]
        # An agent of `wandb sweep` has chosen the id, by which it finds the run's losses.
        fresh_id = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
        run_id = online[-1] if mode == "online" and online else fresh_id
        links = [run["id"] for run in earlier if run["id"] != run_id]
        self._run = wandb.init(
            mode=mode,
            project=project,
            group=group,
            name=name[:_LONGEST_NAME],
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
        if not any(run["id"] == run_id for run in earlier):
            temp = ids_file.with_suffix(".tmp")
            temp.write_text(json.dumps([*earlier, {"id": run_id, "mode": mode}]))
            os.replace(temp, ids_file)

    def record(self, rec: dict[str, Any]) -> None:
        """Log the numbers of a record under ``<kind>/<field>``, lists as histograms (see ``flatten``)."""
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
        """Finish the W&B run, which uploads or writes what is still buffered."""
        if self._run is not None:
            run, self._run = self._run, None
            run.finish()


def _settings(wandb: Any, mode: str) -> Any:
    """W&B's settings; all times in seconds."""
    return wandb.Settings(
        console="off",  # the console belongs to the progress bar
        silent=mode == "offline",
        init_timeout=60,
        login_timeout=30,  # an unattended terminal is not asked for a key for ever
        finish_timeout=20,  # a run that is told to stop has half a minute; the rest waits on disk for `wandb sync`
    )


def flatten(rec: Mapping[str, Any]) -> Iterator[Curve]:
    """Yield what a record shows: ``("layer_00/attn/c_attn/sigma_max", 1.0)``.

    A field that is a list of layers of heads, or of depths, becomes a curve a layer; any other non-empty list of numbers stays one, for
    a histogram. Dicts become paths; None is left out. Beside a list ``sigma`` of singular values stand ``sigma_max``, ``sigma_min``
    and ``stable_rank`` = Σσ²/σ_max².
    """
    fields = {key: value for key, value in rec.items() if key not in ("kind", "step", "name")}
    if rec["kind"] == "probe":
        yield from _probe(fields)
    elif rec["kind"] in ("spectra", "certificate") and isinstance(rec.get("name"), str):
        place = matrix_place(rec["name"])
        yield from _fields(fields, f"{place}/certificate" if rec["kind"] == "certificate" else place)
    else:
        yield from _fields(fields, {"eval": "val", "full_eval": "val/full"}.get(rec["kind"], rec["kind"]))


def matrix_place(name: str) -> str:
    """Where the curves of a parameter stand.

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
        if not isinstance(value, list):
            yield from _fields({key: value}, "probe")
            continue
        for i, item in enumerate(value):
            if isinstance(item, list):  # one number a head
                sound = not any(map(math.isnan, item))
                for curve, reduce in OVER_HEADS.get(key, {key: _mean}).items():
                    yield f"layer_{i:02d}/attn/{curve}", reduce(item) if sound else math.nan
            else:  # one number a depth, the first before any layer
                yield f"{f'layer_{i - 1:02d}' if i else 'embedding'}/stream/{key}", item


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
