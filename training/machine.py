"""The device and the machine of a run: what they are, compilation for them, speed and memory."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from model.loss import mark_constants
from optim.linalg import allow_programs
from training.files import ROOT
from training.settings import Settings

if TYPE_CHECKING:
    from model.gpt import GPT
    from training.ranks import Ranks


def resolve_device(cfg: Settings) -> tuple[torch.device, torch.dtype]:
    """The device and the dtype of a run. `auto` means CUDA with bfloat16 if there is a CUDA device, otherwise the CPU with float32."""
    name = cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    automatic = "bfloat16" if name == "cuda" else "float32"
    return torch.device(name), getattr(torch, automatic if cfg.dtype == "auto" else cfg.dtype)


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done what it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compiled(module: nn.Module, cfg: Settings, device: torch.device) -> nn.Module:
    """The module, compiled if the configuration asks for it; `compile=auto` means on CUDA, where it saves time within a minute.

    Shapes and numbers are constants of a program. By default, torch makes them variables after a second value, so the last, smaller batch
    of an evaluation would make training slower.
    """
    if not (device.type == "cuda" if cfg.compile == "auto" else cfg.compile):
        return module
    import torch._dynamo  # here, because it takes seconds

    mark_constants()
    torch._dynamo.config.specialize_float = True
    allow_programs()  # a table compares a dozen models, and torch would silently stop compiling them
    program: Any = torch.compile(module, dynamic=False)
    return program


PEAK = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}
"""Dense bfloat16 peak of one device, in FLOP/s, by a part of its name (vendors' data sheets)."""


def peak_flops(device: torch.device) -> float | None:
    """The device's peak in FLOP/s, of which MFU is a share; None for a CPU and for a device that PEAK does not name."""
    return next((flops for part, flops in PEAK.items() if device.type == "cuda" and part in device_name()), None)


@cache
def code_version() -> str:
    """The commit of this program's repository, with "+ changes" if tracked files differ from it.

    Outside a repository it is what the environment variable MANIFOLD_GPT_CODE says, else "unknown".
    """
    told = os.environ.get("MANIFOLD_GPT_CODE") or "unknown"

    def git(*words: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != ROOT:
            return told  # the repository is another one, in which this program is installed
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + (" + changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return told


def environment(device: torch.device | None = None) -> dict[str, str]:
    """The versions and the device, on which results depend besides the configuration; None: the GPU if there is one."""
    return {
        "code": code_version(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "device": device_name(device),
        "platform": ", ".join(
            filter(None, [f"{platform.system()} {platform.machine()}", " ".join(filter(None, platform.libc_ver()))])
        ),
    }


def device_name(device: torch.device | None = None) -> str:
    """The name of the GPU, or of the processor with the number of threads that torch uses; None: of the GPU if there is one."""
    if torch.cuda.is_available() if device is None else device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    threads = torch.get_num_threads()
    return f"CPU {names[0] if names else platform.machine()}, {threads} thread{'s' if threads > 1 else ''}"


def speed(tokens_per_s: float, model: GPT, device: torch.device, ranks: Ranks) -> dict[str, Any]:
    """The fields of a `train` record on speed and memory: MFU is the share of the peak of all devices that the model's operations use."""
    peak = peak_flops(device)
    mfu = tokens_per_s * model.flops_per_token() / (peak * ranks.world) if peak else None
    return {"tokens_per_s": tokens_per_s, "mfu": mfu, "peak_device_bytes": peak_device_bytes(device)}


def peak_device_bytes(device: torch.device) -> int | None:
    """The most memory that tensors of this run have had on the GPU; None on a CPU. Does not wait for the device."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
