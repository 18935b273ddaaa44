"""Compile what scripts/gpu_check.sh measures, several programs at the same time, so that the benchmarks find them in the compiler's cache.

    python scripts/gpu_programs.py micro_batch_size=64

One process compiles one program after the other, most of the time in Python: a minute and more for the update of one assignment. Here the
model, the updates and the residual rules each have a process of their own. Nothing is measured. training=true compiles what a training needs
and a benchmark does not, an evaluation and updates with a second round of the retraction, and leaves out the residual rules. tiny=true takes
small models; only= names a single part.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from functools import partial
from getpass import getuser
from pathlib import Path

import torch

from optim.stack import TWO_ROUNDS
from scripts.bench_residual import residual_trainings
from scripts.bench_train import UNTRAINED, RandomTraining
from scripts.command import UsageError, parse, run
from training.compiler import CompilerWatch
from training.config import compose

UPDATES = ("hetero", "hetero_inv", "unconstrained")
"""Assignments whose updates are compiled: together they have every manifold of the five at every shape."""
MODEL, RESIDUAL = "model", "residual"
"""The parts that are the model in training, and a smaller one under every residual rule."""
TINY = {"layers": 1, "width": 96, "block": 64, "micro": 2, "tokens": 128}
"""Sizes of the smaller model, see RESIDUAL_SIZES, with tiny=true."""


def compile_part(part: str, micro: int, tiny: bool, for_training: bool) -> None:
    """Compile one part by making a step with it; afterwards it is in the compiler's cache on the disk."""
    if part == RESIDUAL:
        for _, training in residual_trainings(TINY if tiny else {}):
            training.step()
        return
    assignment = "adamw" if part == MODEL else part
    model = ["model=demo", "model.n_layer=1"] if tiny else ["model=gpt2_124m"]
    cfg = compose([*model, f"assignment={assignment}", *UNTRAINED])
    training = RandomTraining(cfg, micro, micro * cfg.model.block_size)
    if part == MODEL:
        training.step()
        if for_training:
            training.model.eval()
            with torch.no_grad():
                training.forward()
        return
    for p in training.model.parameters():
        p.grad = torch.randn_like(p)
    training.optimizers.step()
    if for_training and (muon := training.optimizers.muon):
        muon.update([TWO_ROUNDS] * len(muon.buckets))


def forget_choices() -> None:
    """Remove the choices between variants of a kernel from the compiler's cache: they were timed while other processes used the device.

    The next process times them again, without compiling them.
    """
    given = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    for file in Path(given or Path(tempfile.gettempdir(), f"torchinductor_{getuser()}")).rglob("*.best_config"):
        file.unlink(missing_ok=True)


def work(arguments: list[str]) -> int:
    """Compile all parts, each in a process; 1 if one fails.

    Raises:
        UsageError: the command line is wrong.
    """
    words, o = parse(arguments, {"micro_batch_size": 64, "tiny": False, "training": False, "only": ""})
    parts = (MODEL, *UPDATES, *(() if o["training"] else (RESIDUAL,)))
    if words or o["micro_batch_size"] < 1 or o["only"] not in ("", *parts):
        raise UsageError(
            f"give micro_batch_size= from 1 on, tiny=, training= and only=, one of {', '.join(parts)}; see --help"
        )
    if o["only"]:
        watch = CompilerWatch(active=True)
        compile_part(o["only"], o["micro_batch_size"], o["tiny"], o["training"])
        print(f"{o['only']}: {(watch.read() or {}).get('message', 'compiled nothing')}", flush=True)
        return 0
    processes = {part: subprocess.Popen([sys.executable, __file__, *arguments, f"only={part}"]) for part in parts}
    try:
        failed = [part for part, process in processes.items() if process.wait() != 0]
    finally:
        for process in processes.values():
            process.kill()
        forget_choices()
    print(f"failed, see above: {', '.join(failed)}" if failed else "compiled", flush=True)
    return 1 if failed else 0


main = partial(run, work, __doc__)

if __name__ == "__main__":
    sys.exit(main())
