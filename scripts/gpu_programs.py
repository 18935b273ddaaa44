"""Compile what scripts/gpu_check.sh measures, several programs at the same time, so that the benchmarks find them in the compiler's cache.

    python scripts/gpu_programs.py micro_batch_size=64

One process compiles one program after the other, most of the time in Python: a minute and more for the update of one assignment. Here the
model and the updates each have a process of their own. Nothing is measured. tiny=true takes a small model; only= names a single part.
"""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import torch

from scripts.bench_train import UNTRAINED, RandomTraining
from scripts.command import UsageError, parse, run
from training.config import compose

UPDATES = ("hetero", "hetero_inv", "unconstrained")
"""Assignments whose updates are compiled: together they have every manifold of the five at every shape."""
MODEL = "model"
"""The part that is the model in training."""


def compile_part(part: str, micro: int, tiny: bool) -> None:
    """Compile one part by making a step with it; afterwards it is in the compiler's cache on the disk."""
    assignment = "adamw" if part == MODEL else part
    model = ["model=demo", "model.n_layer=1"] if tiny else ["model=gpt2_124m"]
    cfg = compose([*model, f"assignment={assignment}", *UNTRAINED])
    training = RandomTraining(cfg, micro, micro * cfg.model.block_size)
    if part == MODEL:
        training.step()
        return
    for p in training.model.parameters():
        p.grad = torch.randn_like(p)
    training.optimizers.step()


def work(arguments: list[str]) -> int:
    """Compile all parts, each in a process; 1 if one fails.

    Raises:
        UsageError: the command line is wrong.
    """
    words, o = parse(arguments, {"micro_batch_size": 64, "tiny": False, "only": ""})
    parts = (MODEL, *UPDATES)
    if words or o["micro_batch_size"] < 1 or o["only"] not in ("", *parts):
        raise UsageError(f"give micro_batch_size= from 1 on, tiny= and only=, one of {', '.join(parts)}; see --help")
    if o["only"]:
        compile_part(o["only"], o["micro_batch_size"], o["tiny"])
        return 0
    processes = {part: subprocess.Popen([sys.executable, __file__, *arguments, f"only={part}"]) for part in parts}
    try:
        failed = [part for part, process in processes.items() if process.wait() != 0]
    finally:
        for process in processes.values():
            process.kill()
    print(f"failed, see above: {', '.join(failed)}" if failed else "compiled", flush=True)
    return 1 if failed else 0


main = partial(run, work, __doc__)

if __name__ == "__main__":
    sys.exit(main())
