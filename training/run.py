"""Where a run lives and what it runs on."""

from __future__ import annotations

import platform
import re
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn

from training.log import METRICS_FILE
from training.stability import Stability
from training.validate import ConfigError


def resolve_device(cfg: dict[str, Any]) -> tuple[torch.device, torch.dtype]:
    """What `auto` means here: CUDA where there is one, and bfloat16 on it."""
    name = cfg["device"] if cfg["device"] != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    automatic = "bfloat16" if name == "cuda" else "float32"
    return torch.device(name), getattr(torch, automatic if cfg["dtype"] == "auto" else cfg["dtype"])


# Programs that torch keeps of one function before it gives up compiling it, which it does not say: a table compares a dozen models.
_PROGRAMS = 64


def compiled(module: nn.Module, cfg: dict[str, Any], device: torch.device) -> nn.Module:
    """The module through torch.compile where the configuration asks for it: `auto` does on CUDA, where it pays within a minute.

    Shapes and numbers are constants of a program. The default makes them variables once a second value is seen, and so the last, smaller
    batch of an evaluation would make the program of training a slower one.
    """
    if not (device.type == "cuda" if cfg["compile"] == "auto" else cfg["compile"]):
        return module
    import torch._dynamo  # here, because it takes seconds

    torch._dynamo.config.specialize_float = True
    torch._dynamo.config.recompile_limit = _PROGRAMS
    return torch.compile(module, dynamic=False)


def run_name(cfg: dict[str, Any]) -> str:
    """The configured name, or the assignment's as one lower-case word."""
    return cfg["name"] or cfg["assignment"]["name"].lower().replace("-", "_")


def run_directory(cfg: dict[str, Any]) -> Path:
    """Where this run is written. Resuming without a directory takes the newest run of the same name."""
    if cfg["output_dir"]:
        directory = Path(cfg["output_dir"])
        if cfg["resume"] == "never" and (directory / METRICS_FILE).exists():
            raise ConfigError(
                [f"output_dir={directory} already holds a run; add resume=auto to continue it, or choose another"]
            )
        return directory
    name = run_name(cfg)
    if cfg["resume"] == "auto":
        runs = [p for p in Path("outputs").glob(f"*-*-*/{name}*") if p.name.partition(".")[0] == name]
        if runs:
            return max(runs, key=lambda p: p.stat().st_mtime)
    first = Path("outputs") / date.today().isoformat() / name
    taken = (p for n in range(1, 10_000) if not (p := first if n == 1 else first.with_name(f"{name}.{n}")).exists())
    return next(taken)


def environment() -> dict[str, str]:
    """Versions and devices: what a number depends on besides its configuration."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "device": device_name(),
        "platform": platform.platform(),
    }


def device_name() -> str:
    """The accelerator's own name, or the processor's and how many threads torch gives it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    threads = torch.get_num_threads()
    return f"CPU {names[0] if names else platform.machine()}, {threads} thread{'s' if threads > 1 else ''}"


def summary(stability: Stability, seconds: float, device: torch.device) -> dict[str, Any]:
    """What a table needs of a finished run."""
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    return {
        "best_val_loss": stability.best,
        "best_step": stability.best_step,
        "unstable_step": stability.unstable_step,
        "reason": stability.reason,
        "warning_lead": stability.lead,
        "train_seconds": seconds,
        "peak_device_bytes": memory,
    }
