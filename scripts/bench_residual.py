"""What a residual rule costs: training steps of all rules in one process, as ratios to pre-norm. `scripts/bench.py residual` runs it.

A step is the one of scripts/bench_train.py under AdamW. Rules are timed by turns, each turn in a new random order. The time ratio is that of
the fastest steps, because other work on the machine disturbs them least; the median ratio is that of the medians. The vocabulary is small, so
the ratios are those of all but the head. Memory is what a forward pass keeps for its backward pass. nGPT is compared with a pre-norm model
that has its rotary positions, SwiGLU and head.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from model.residual import RESIDUAL_RULES
from scripts.bench_train import RandomTraining
from scripts.timing import NOT_MEASURED, Rows, note_failure, steps_together, take_turns
from training.config import compose
from training.signals import Stopped

NGPT_PARTS = ["model.rope=true", "model.mlp=swiglu", "model.tied=false"]
RESIDUAL_SIZES = {
    "cpu": {"layers": 2, "width": 768, "heads": 12, "block": 512, "vocab": 512, "micro": 2, "tokens": 2048},
    "cuda": {"layers": 4, "width": 768, "heads": 12, "block": 1024, "vocab": 512, "micro": 16, "tokens": 65536},
}
"""Two blocks of GPT-2 124M on a CPU, four on CUDA."""


def residual_settings() -> dict[str, tuple[str, list[str]]]:
    """Name of a row → (the row that it is compared with, overrides of train.py); what has a bar comes first, if time is short."""
    partner = "pre_norm, nGPT's parts"
    found = {rule: ("pre_norm", ["model=gpt2_124m", f"residual={rule}"]) for rule in ("pre_norm", "geonorm")}
    found[partner] = (partner, ["model=gpt2_124m", *NGPT_PARTS])
    found["nGPT"] = (partner, ["model=ngpt_124m"])
    others = {rule: ("pre_norm", ["model=gpt2_124m", f"residual={rule}"]) for rule in RESIDUAL_RULES}
    return {**found, **{rule: setting for rule, setting in others.items() if rule not in found}}


def kept_bytes(forward: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes that a forward pass keeps for its backward pass, without the weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = forward()
    del loss  # until here nothing that was kept was freed, so no address was used twice
    return sum(kept.values())


def residual_trainings(sizes: Mapping[str, int]) -> Iterator[tuple[str, RandomTraining]]:
    """Every row's name and its model in training, one after the other; sizes: other values for any of the keys of RESIDUAL_SIZES."""
    size = RESIDUAL_SIZES["cuda" if torch.cuda.is_available() else "cpu"] | dict(sizes)
    shape = {"n_layer": "layers", "n_embd": "width", "n_head": "heads", "block_size": "block", "vocab_size": "vocab"}
    chosen = [*(f"model.{key}={size[name]}" for key, name in shape.items()), "assignment=adamw"]
    for name, (_, overrides) in residual_settings().items():
        torch.manual_seed(0)
        yield name, RandomTraining(compose([*overrides, *chosen]), size["micro"], size["tokens"])


def residual_rows(options: Mapping[str, Any], sizes: Mapping[str, int] | None = None) -> Rows:
    """Seconds of a training step under every rule, and the ratios of time and of kept memory to those of pre-norm.

    Args:
        options: layers, width, micro_batch_size, repeats and limit_s of the command line; 0 for the default.
        sizes: other values for any of the keys of RESIDUAL_SIZES; tokens must be a multiple of block.
    """
    asked = {"layers": options["layers"], "width": options["width"], "micro": options["micro_batch_size"]}
    settings = residual_settings()
    trainings = dict(residual_trainings({**(sizes or {}), **{key: value for key, value in asked.items() if value}}))
    steps = {name: training.step for name, training in trainings.items()}
    repeats, together = options["repeats"] or 7, steps_together()
    seconds = take_turns(steps, repeats, together, options["limit_s"], shuffled=True, together=together)
    rows, kept = [], {}
    with suppress(Stopped):
        for name in filter(seconds.get, trainings):
            try:
                kept[name] = kept_bytes(trainings[name].forward, trainings[name].model)
            except Exception:
                note_failure(name)
    for name, (partner, _) in settings.items():
        mine, theirs = seconds[name], seconds[partner]
        row: dict[str, Any] = dict.fromkeys(("fastest s", "time ratio", "median ratio", "memory ratio"), NOT_MEASURED)
        if mine and theirs:
            row |= {"fastest s": min(mine), "time ratio": min(mine) / min(theirs)}
            row |= {"median ratio": statistics.median(mine) / statistics.median(theirs)}
        if name in kept and partner in kept:
            row |= {"memory ratio": kept[name] / kept[partner]}
        rows.append({"rule": name, **row, "compared with": partner, "all s": mine})
    return rows
