"""Checks of relations between settings, and of settings against this machine.

training/fields.py checks single values, by the annotations in training/settings.py.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from training.settings import Settings


class ConfigError(Exception):
    """A configuration that cannot run; the message lists every problem, each with its remedy."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        count = f"{len(self.problems)} problems" if len(self.problems) > 1 else "1 problem"
        super().__init__(
            "\n".join([f"the configuration has {count}; nothing was written:", *(f"  - {p}" for p in self.problems)])
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problems,)  # for pickle, which would pass the message only


def problems_of_machine(cfg: Settings) -> list[str]:
    """Problems of the device and of the directory of the run on this machine."""
    import torch

    found = []
    if cfg.device == "cuda" and not torch.cuda.is_available():
        found.append("device=cuda, but torch finds no CUDA device; use device=auto or device=cpu")
    if cfg.output_dir is not None:
        found += problems_of_directory(Path(cfg.output_dir))
    return found


def problems_of_capture(cfg: Settings) -> list[str]:
    """Why the update cannot be recorded as a CUDA graph."""
    if not cfg.capture:
        return []
    import torch  # takes a second

    if cfg.device == "cpu" or not torch.cuda.is_available():
        return ["capture=true records a CUDA graph, and the device is a CPU; use capture=false"]
    if cfg.optim.library is not None:
        return [
            f"capture=true cannot record {cfg.optim.library.optimizer}, for which the host reads a number in each step; use capture=false"
        ]
    if getattr(cfg.optim.muon.rule, "retraction", None) == "sorted_svd":
        return [
            "capture=true cannot record optim.muon.rule.retraction=sorted_svd, whose eigenvalue solver waits for the device; "
            "use optim.muon.rule.retraction=manifold or capture=false"
        ]
    return []


def problems_of_compiler(cfg: Settings) -> list[str]:
    """Why the compiler refuses the step of ManifoldMuon.

    torch 2.9.0 alone cannot compile `bmm` with `out_dtype` (github.com/pytorch/pytorch/issues/165892).
    """
    import torch

    from optim.assignment import ADAMW

    if not torch.__version__.startswith("2.9.0") or cfg.device == "cpu" or not torch.cuda.is_available():
        return []
    optim, rule, manifolds = cfg.optim, cfg.optim.muon.rule, set((cfg.assignment.rules or {}).values()) - {ADAMW}
    if optim.library or optim.modular or not manifolds or rule.kind != "certified":
        return []
    if rule.compile is False or rule.products == "float32":
        return []
    return [
        f"torch {torch.__version__} cannot compile the certified step on CUDA; install torch 2.9.1 or later, or use optim.muon.rule.compile=false"
    ]


def problems_of_backend(cfg: Settings) -> list[str]:
    """Why the backend that is asked for cannot compute the attention."""
    asked = cfg.attention_backend
    if asked in (None, "auto"):
        return []
    found = []
    if asked in ("cudnn", "efficient") and cfg.device == "cpu":
        found.append(f"attention_backend={asked} is for CUDA, and the device is a CPU; use attention_backend=auto")
    parts = {"attention.logit_cap": cfg.attention.logit_cap, "batches.documents": cfg.batches.documents}
    return found + [
        f"attention_backend={asked} has no effect with {key}, for which attention is explicit or masked; use attention_backend=auto"
        for key, value in parts.items()
        if value
    ]


def problems_of_directory(directory: Path, key: str = "output_dir") -> list[str]:
    """Problems of creating or writing to a directory, which `key` gives."""
    try:
        there = next(p for p in (directory, *directory.absolute().parents) if p.exists())
    except OSError as error:
        return [f"{key}={directory} cannot be used ({error.strerror}); choose another"]
    if not there.is_dir():
        return [f"{key}={directory} cannot be used, because {there} is a file; choose another"]
    try:  # a permission alone does not say it, of a disk that is mounted for reading, or of /proc
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        return [
            f"{key}={directory} cannot be used, because {there} cannot be written to ({error.strerror}); choose another"
        ]
    return []


def problems_of_batch(cfg: Settings, world: int) -> list[str]:
    """The problem that the global batch cannot be divided equally among the ranks, if so."""
    tokens, block = cfg.global_batch_tokens, cfg.model.block_size
    share = block * world
    if tokens % share == 0:
        return []
    near = sorted({max(share, tokens // share * share), (tokens // share + 1) * share})
    ranks = f" x {world} ranks = {share}" if world > 1 else ""
    return [
        f"global_batch_tokens={tokens} is not a multiple of block_size {block}{ranks}; "
        f"use global_batch_tokens={' or '.join(map(str, near))}"
    ]


def problems_of_shard(cfg: Settings) -> list[str]:
    """What `launcher.shard=fsdp` cannot do: use or change whole weights where they lie on other ranks, except in products."""
    if cfg.launcher.shard != "fsdp":
        return []
    ddp = "use launcher.shard=ddp"
    refused = [
        (
            cfg.attention.qk_clip and cfg.attention.qk_clip_on == "weights",
            "attention.qk_clip_on=weights",
            "use attention.qk_clip_on=gain, or launcher.shard=ddp",
        ),
        (cfg.model.unit_weights, "model.unit_weights=true", ddp),
        (cfg.average.kind != "none", f"average={cfg.average.kind}", "use average=none, or launcher.shard=ddp"),
        (cfg.capture, "capture=true", "use capture=false, or launcher.shard=ddp"),
        (cfg.optim.library is not None, "optim.library", ddp),
        (cfg.optim.modular is not None, "optim.modular", ddp),
        (
            cfg.log.interval_updates is not None,
            "log.interval_updates",
            "use log.interval_updates=null, or launcher.shard=ddp",
        ),
    ]
    return [f"launcher.shard=fsdp does not work with {key}; {remedy}" for asked, key, remedy in refused if asked]


def problems_of_order(cfg: Settings) -> list[str]:
    """The problem that windows of these data have no order, if so."""
    from data.mix import Mix  # NumPy takes a tenth of a second

    if cfg.batches.order != "in_order" or not isinstance(cfg.data, Mix):
        return []
    return ["batches.order=in_order: a mixture has no order; use replacement or epoch"]


def problems_of_documents(cfg: Settings) -> list[str]:
    """What does not work with `batches.documents`."""
    parts = {
        "attention.qk_clip": cfg.attention.qk_clip,
        "attention.head_gate=position": cfg.attention.head_gate == "position",
        "probe.interval": cfg.probe.interval,
    }
    return [
        f"batches.documents=true does not work with {key}, which does not know documents; switch one of them off"
        for key, value in parts.items()
        if value and cfg.batches.documents
    ]
