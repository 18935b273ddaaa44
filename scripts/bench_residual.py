"""What a residual rule costs: training steps of all rules in one process, as ratios to pre-norm; `scripts/bench.py residual` runs it.

A step is forward, backward and AdamW, as train.py does it: compiled and in bfloat16 on CUDA, plain float32 on the CPU. Rules take turns
in an order drawn anew each turn. The time ratio is that of the fastest steps, which other work on a machine disturbs least; the median
ratio is of medians. Memory is what a forward pass keeps for its backward pass. nGPT is compared with a pre-norm model that has its
rotary positions, SwiGLU and head.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from model.gpt import GPT
from model.residual import RESIDUAL_RULES
from training.build import build_optimizers, gpt_config
from training.config import compose
from training.run import compiled

NGPT_PARTS = ["model.rope=true", "model.mlp=swiglu", "model.tied=false"]
CPU_SIZES = {"layers": 2, "width": 768, "heads": 12, "block": 512, "vocab": 512, "micro": 2, "tokens": 2048}
"""Two blocks of GPT-2 124M."""
CUDA_SIZES = {"layers": 12, "width": 768, "heads": 12, "block": 1024, "vocab": 50304, "micro": 16, "tokens": 65536}
"""GPT-2 124M itself."""


def contestants() -> dict[str, tuple[str, list[str]]]:
    """Name → (what it is compared with, overrides of train.py)."""
    plain = {rule: ("pre_norm", ["model=gpt2_124m", f"residual={rule}"]) for rule in RESIDUAL_RULES}
    partner = "pre_norm, nGPT's parts"
    plain[partner] = (partner, ["model=gpt2_124m", *NGPT_PARTS])
    plain["nGPT"] = (partner, ["model=ngpt_124m"])
    return plain


def training_step(
    overrides: Sequence[str], sizes: Mapping[str, int], device: torch.device
) -> tuple[Callable[[], None], Callable[[], int]]:
    """A function that trains a fresh model by one step, and one that returns the bytes its forward pass keeps."""
    shape = {"n_layer": "layers", "n_embd": "width", "n_head": "heads", "block_size": "block", "vocab_size": "vocab"}
    chosen = [f"model.{key}={sizes[name]}" for key, name in shape.items()]
    cfg = compose([*overrides, *chosen, "assignment=adamw"])
    torch.manual_seed(0)
    model = GPT(gpt_config(cfg)).to(device)
    optimizers = build_optimizers(model, cfg, model.unit_vectors())
    on_cuda = device.type == "cuda"
    replica = compiled(model, cfg, device)
    windows = torch.randint(sizes["vocab"], (sizes["tokens"] // sizes["block"], sizes["block"] + 1), device=device)

    def step() -> None:
        for part in windows.split(sizes["micro"]):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=on_cuda):
                _, loss = replica(part[:, :-1], part[:, 1:])
            loss.backward()
        optimizers.step()
        optimizers.zero_grad()
        if on_cuda:
            torch.cuda.synchronize()

    def forward() -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=on_cuda):
            return replica(windows[: sizes["micro"], :-1], windows[: sizes["micro"], 1:])[1]

    return step, lambda: kept_bytes(forward, model)


def kept_bytes(forward: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes that a forward pass keeps for its backward pass, the weights themselves left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = forward()
    del loss  # until here nothing kept was freed, so that no address was counted for another
    return sum(kept.values())


def measure(sizes: Mapping[str, int] | None = None, repeats: int = 7) -> list[dict[str, Any]]:
    """Rows with the seconds of a training step, their ratios to pre-norm's, and that of the bytes kept for the backward pass.

    Args:
        sizes: any of the keys of CPU_SIZES in place of the device's own; tokens must be a multiple of block.
        repeats: turns that are timed, after one that is not.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = {**(CUDA_SIZES if device.type == "cuda" else CPU_SIZES), **(sizes or {})}
    entries = contestants()
    made = {name: training_step(overrides, sizes, device) for name, (_, overrides) in entries.items()}
    steps = {name: step for name, (step, _) in made.items()}
    kept = {name: bytes_of() for name, (_, bytes_of) in made.items()}
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order, shuffle = list(steps), random.Random(0).shuffle
    for _ in range(repeats):
        shuffle(order)
        for name in order:
            start = time.perf_counter()
            steps[name]()
            seconds[name].append(time.perf_counter() - start)
    rows = []
    for name, (partner, _) in entries.items():
        mine, theirs = seconds[name], seconds[partner]
        row = {"rule": name, "fastest s": min(mine), "time ratio": min(mine) / min(theirs)}
        row["median ratio"] = statistics.median(mine) / statistics.median(theirs)
        row |= {"memory ratio": kept[name] / kept[partner], "compared with": partner, "all s": mine}
        rows.append(row)
    return rows
