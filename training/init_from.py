"""Start a run from weights that exist: of Hugging Face, of nanoGPT, of another run, or of a file that scripts/export.py wrote.

The weights are read as they are; then the assignment brings each matrix onto its manifold. A run prints how far each kind of matrix moved,
and the validation loss before and after: fine-tuning on a manifold begins with that loss.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.convert import NotGPT2, Weights, changed_attention, from_hf, from_nanogpt, known_settings, misfits, take
from model.gpt import GPT
from optim.assignment import folded
from training.build import gpt_config
from training.checkpoint import load_newest
from training.files import run_around
from training.optimizers import Optimizers
from training.ranks import Ranks
from training.resume import check_parts, foreign
from training.safetensors_file import SETTINGS, is_tensor_file, read_tensors
from training.settings import settings_of
from training.validate import ConfigError

_HF_CONFIG, _HF_WEIGHTS = "config.json", ("model.safetensors", "pytorch_model.bin")
_REMEDY = (
    "give a run's directory, a folder with config.json and model.safetensors or pytorch_model.bin, a file of scripts/export.py, "
    "nanoGPT's ckpt.pt, or the name of a GPT-2 on huggingface.co such as gpt2"
)


def start_from(
    ranks: Ranks, source: str, model: GPT, optimizers: Optimizers, loss: Callable[[], float]
) -> tuple[dict[str, Any], list[str]]:
    """Give a new model the weights of `source`, and bring them onto their manifolds. All ranks must call.

    loss: the validation loss (nats a token) of the model as it is.

    Returns:
        The fields of the run's record `init_from`, and the lines that it prints.

    Raises:
        ConfigError: there are no such weights, or they do not fit the model. CheckpointError: a run has no good checkpoint.
    """
    weights = read_weights(ranks.from_main(located, source))
    if problems := misfits(weights, model.config) or take(weights, model):
        raise ConfigError([f"init_from={source}: {problem}" for problem in problems])
    before = loss()
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.ndim == 2}
    optimizers.bring_onto_manifold()
    moved = movement(start, dict(model.named_parameters()))
    after = loss() if moved else before
    lines = [f"weights of {weights.source}: validation loss {before:.4f}"]
    if moved:
        lines[0] += (
            f", {after:.4f} after these matrices moved onto their manifolds, by ‖ΔW‖/‖W‖ (new ‖W‖ over the old one)"
        )
        width = max(map(len, moved))
        lines += [f"  {name.ljust(width)}  {by:.4f}  ({to:.4f})" for name, (by, to) in moved.items()]
    lines += changed_attention(weights, model.config)
    record = {
        "source": weights.source,
        "loss_before": before,
        "loss": after,
        "moved": {name: by for name, (by, _) in moved.items()},
        "length": {name: to for name, (_, to) in moved.items()},
    }
    return record, lines


def movement(start: dict[str, Tensor], now: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
    """‖ΔW‖_F/‖W‖_F and ‖W + ΔW‖_F/‖W‖_F of each kind of matrix that has changed, over all its layers together, by folded name."""
    squares: dict[str, list[Tensor]] = {}
    names: dict[str, list[str]] = {}
    for name, W in start.items():
        [kind] = folded([".".join("0" if part.isdigit() else part for part in name.split("."))])
        names.setdefault(kind, []).append(name)
        parts = (now[name] - W, now[name], W)
        squares.setdefault(kind, []).append(torch.stack([t.detach().double().square().sum() for t in parts]))
    found = {}
    for kind, each in squares.items():
        moved, length, old = torch.stack(each).sum(0).tolist()
        if moved > 0:
            found[folded(names[kind])[0]] = (
                ((moved / old) ** 0.5, (length / old) ** 0.5) if old else (float("inf"),) * 2
            )
    return found


# ---- reading ----


def located(source: str) -> Path:
    """The file or folder of the weights on this machine; a name of huggingface.co is downloaded once.

    Raises:
        ConfigError: there is none.
    """
    path = Path(source)
    if path.exists():
        return path
    here = "/" in source and path.parent.is_dir()  # a misspelt path, such as outputs/frist
    if here or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", source):  # no name of huggingface.co
        raise ConfigError([f"init_from={source}: there is no such file; {_REMEDY}"])
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError
    except ImportError:
        raise ConfigError(
            [f"init_from={source}: there is no such file; {_REMEDY}, for which: pip install huggingface_hub"]
        ) from None
    print(f"init_from={source}: there is no such file here; huggingface.co is asked", file=sys.stderr, flush=True)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it warns of every attempt
    try:
        folder = Path(hf_hub_download(source, _HF_CONFIG)).parent
        try:
            hf_hub_download(source, _HF_WEIGHTS[0])
        except EntryNotFoundError:
            hf_hub_download(source, _HF_WEIGHTS[1])
    except Exception as error:  # of the network, of names, of access: the library has dozens
        cause = " ".join(str(error).split())[:200]
        raise ConfigError(
            [
                f"init_from={source}: there is no such file, and it cannot be had from huggingface.co ({type(error).__name__}: {cause}); "
                f"{_REMEDY}. Without a network, download the folder elsewhere and name it"
            ]
        ) from None
    return folder


def read_weights(path: Path) -> Weights:
    """The weights in a file or folder, on the CPU. No code in it is executed.

    Raises:
        ConfigError: it holds none that can be read. CheckpointError: it is a run without a good checkpoint.
    """
    if run := run_around(path):
        raise ConfigError(
            [
                f"init_from={path} is a part of a run; init_from={run} takes its newest checkpoint, and resume=<a checkpoint> with another "
                "output_dir goes on from one"
            ]
        )
    try:
        if (path / "checkpoints").is_dir():
            return _of_run(path)
        if path.is_dir():
            about = json.loads((path / _HF_CONFIG).read_text(encoding="utf-8"))
            file = next((path / name for name in _HF_WEIGHTS if (path / name).exists()), path / _HF_WEIGHTS[0])
            return from_hf(str(path), about, _tensors(file))
        if is_tensor_file(path):
            tensors, metadata = read_tensors(path)
            if SETTINGS not in metadata:
                raise ValueError(f"it does not say of which model; if {_HF_CONFIG} lies beside it, give their folder")
            return Weights(str(path), tensors, json.loads(metadata[SETTINGS]))
        return from_nanogpt(str(path), _tensors(path))
    except (NotGPT2, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        cause = f"there is no {Path(error.filename).name}" if isinstance(error, FileNotFoundError) else error
        raise ConfigError([f"init_from={path}: it cannot be read ({cause}); {_REMEDY}"]) from error


def _of_run(directory: Path) -> Weights:
    loaded = load_newest(directory / "checkpoints")
    if loaded is None:
        raise ValueError("the run has no checkpoint yet")
    for path, reason in loaded.skipped:
        print(f"skipped {path}: {reason}", file=sys.stderr)
    check_parts(loaded)
    with foreign(loaded):
        config = gpt_config(settings_of(loaded.state["config"]))
    return Weights(str(loaded.path), loaded.state["model"], known_settings(config))


def _tensors(file: Path) -> dict[str, Any]:
    if file.suffix == ".safetensors" or is_tensor_file(file):
        return read_tensors(file)[0]
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{file.name} holds more than tensors and plain values ({type(error).__name__})") from error
