"""Training steps on random tokens: their rate and memory by assignment, the kernels in them, and what a probe adds.

`scripts/bench.py train`, `profile` and `probes` run it. A step is forward, backward, clipping and update, as train.py does it: compiled
and in bfloat16 on CUDA, plain float32 on the CPU.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.gpt import GPT
from model.probes import probe
from scripts.command import UsageError
from scripts.timing import NOT_MEASURED, PEAK, device, measure, median, peak_bytes, seconds_of
from training.build import Optimizers, build_optimizers, gpt_config
from training.config import compose
from training.run import compiled, device_name, resolve_device
from training.settings import Settings
from training.step import accumulate, clip

Rows = list[dict[str, Any]]

# Steps a trace shows, and kernels a table names.
_TRACED_STEPS = 2
_KERNELS = 12


def gradients_of(cfg: Settings, options: dict[str, Any]) -> tuple[GPT, int, Callable[[], Tensor]]:
    """A configuration's model, the tokens of a step, and what computes and clips the gradients of random text and returns their norm."""
    where, block = device(), cfg.model.block_size
    micro = options["micro_batch_size"] or (32 if where.type == "cuda" else 2)
    windows = max(1, options["tokens"] // block // micro) * micro
    model = GPT(gpt_config(cfg)).to(where)
    _, dtype = resolve_device(cfg)
    autocast = torch.autocast(where.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
    replica = compiled(model, cfg, where)
    batch = torch.randint(cfg.model.vocab_size, (windows, block + 1)).numpy().astype("uint16")

    def gradients() -> Tensor:
        accumulate(replica, batch, micro, where, autocast)
        return clip([p.grad for p in model.parameters()], 1.0)[0]

    return model, windows * block, gradients


@dataclass
class Contestant:
    """A model in training. spent: seconds of every update so far."""

    assignment: str
    optim: str
    size: str
    model: GPT
    optimizers: Optimizers
    tokens: int
    gradients: Callable[[], Tensor]
    spent: list[float] = field(default_factory=list)

    def step(self) -> None:
        """One training step; the update is timed by itself, and waits for the gradients to be there."""
        norm = self.gradients()
        self.spent.append(seconds_of(lambda: self.optimizers.step(skip=~norm.isfinite())))
        self.optimizers.zero_grad()

    def tensors(self) -> list[Tensor]:
        """What it holds between two steps."""
        states = [value for o in self.optimizers for state in o.state.values() for value in state.values()]
        storages = {t.untyped_storage().data_ptr(): t for t in states if isinstance(t, Tensor)}
        return [*self.model.parameters(), *self.model.buffers(), *storages.values()]


def contestants(options: dict[str, Any]) -> dict[str, Contestant]:
    """A model for every assignment under every step rule; AdamW has no rule."""
    size = options["model"] or ("gpt2_124m" if torch.cuda.is_available() else "mini")
    made = {}
    for optim in options["optims"].split(","):
        for assignment in options["assignments"].split(","):
            kind = "-" if assignment == "adamw" else optim
            if (name := f"{assignment}, {kind}") not in made:
                cfg = compose([f"model={size}", f"assignment={assignment}", f"optim={optim}"])
                model, tokens, gradients = gradients_of(cfg, options)
                optimizers = build_optimizers(model, cfg, model.unit_vectors())
                made[name] = Contestant(assignment, kind, size, model, optimizers, tokens, gradients)
    return made


def bench_train(options: dict[str, Any]) -> Rows:
    """Every assignment a few steps, taking turns; then one step each for its memory."""
    made = contestants(options)
    steps = {name: one.step for name, one in made.items()}
    times = measure(steps, options["repeats"] or 5, warmup=2, limit_s=options["limit_s"])
    peak = next((flops for part, flops in PEAK.items() if part in device_name()), None)
    rows = []
    for name, one in made.items():
        seconds = times[name]
        row: dict[str, Any] = {"assignment": one.assignment, "optim": one.optim, "model": one.size}
        row["tokens a step"] = one.tokens
        row |= dict.fromkeys(("tokens/s", "MFU", "optimizer s", "optimizer share"), NOT_MEASURED)
        row |= {"step s": median(seconds), "peak GiB": NOT_MEASURED, "all s": seconds}
        if seconds:
            update, rate = statistics.median(one.spent[-len(seconds) :]), one.tokens / row["step s"]
            row |= {"tokens/s": rate, "MFU": rate * one.model.flops_per_token() / peak if peak else "n/a"}
            row |= {"optimizer s": update, "optimizer share": update / row["step s"]}
            most = peak_bytes(one.step, one.tensors())
            row["peak GiB"] = "n/a" if most is None else most / 2**30
        rows.append(row)
    return rows


def bench_profile(options: dict[str, Any]) -> Rows:
    """Where the time of a step goes: the operations that take longest, under torch.profiler; the traces go to `traces`."""
    from torch.profiler import ProfilerActivity, profile

    on_cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    rows = []
    for name, one in contestants(options).items():
        for _ in range(3):
            one.step()
        with profile(activities=activities) as profiler:
            for _ in range(_TRACED_STEPS):
                one.step()
        if options["traces"]:
            folder = Path(options["traces"])
            folder.mkdir(parents=True, exist_ok=True)
            word = name.replace(", ", "_").rstrip("_-")
            profiler.export_chrome_trace(str(folder / f"trace_{word}.json.gz"))
        key = "self_device_time_total" if on_cuda else "self_cpu_time_total"
        kind = (
            torch.autograd.DeviceType.CUDA if on_cuda else torch.autograd.DeviceType.CPU
        )  # kernels, or what the host computes
        events = [e for e in profiler.key_averages() if e.device_type == kind and not e.is_user_annotation]
        events.sort(key=lambda event: -getattr(event, key))
        total = sum(getattr(event, key) for event in events) or 1
        for event in events[:_KERNELS]:
            spent = getattr(event, key)
            row = {"assignment": one.assignment, "optim": one.optim, "operation": event.key.replace("|", "/")[:70]}
            row |= {"calls a step": event.count / _TRACED_STEPS, "ms a step": spent / 1e3 / _TRACED_STEPS}
            rows.append({**row, "share": spent / total})
    return rows


def bench_probes(options: dict[str, Any]) -> Rows:
    """One probe beside forward, backward and clipping of some tokens, scaled to a step of the recipe; the update is left out.

    Leaving the update out overstates the probe's share.
    """
    cfg = compose(["experiment=paper", *([f"model={options['model']}"] if options["model"] else [])])
    model, tokens, gradients = gradients_of(cfg, options)
    shape = cfg.probe.windows, cfg.model.block_size
    watched = torch.randint(cfg.model.vocab_size, shape, device=device())

    def step() -> None:
        gradients()
        model.zero_grad(set_to_none=True)

    times = measure({"step": step, "probe": lambda: probe(model, watched)}, options["repeats"] or 3)
    whole = statistics.median(times["step"]) * cfg.global_batch_tokens / tokens
    seconds, interval = statistics.median(times["probe"]), cfg.probe.interval
    if interval is None:
        raise UsageError("experiment=paper has no probe.interval, so a probe has no share of its time; set it there")
    row = {"probe s": seconds, "step s": whole, "measured tokens": tokens, "probe.interval": interval}
    return [{**row, "share of training": f"{100 * seconds / (interval * whole):.3f}%", "all probe s": times["probe"]}]
