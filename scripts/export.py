"""Write a trained model as a plain state dict with nanoGPT's names.

    python scripts/export.py outputs/first gpt.pt
    python scripts/export.py outputs/first gpt.pt weights=average       of a run with average=ema or average=window

In nanoGPT, with the GPTConfig that the command prints:  GPT(config).load_state_dict(torch.load("gpt.pt"))

Hugging Face's GPT2LMHeadModel stores the four matrices of a layer (c_attn, attn.c_proj, c_fc, mlp.c_proj) transposed, in Conv1D.
Give it W.T of each, zeros for a bias that is missing, and activation_function="gelu".
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from model.gpt import GPTConfig
from scripts.analysis.runs import load_model
from scripts.command import UsageError, parse, run

NANOGPT = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "dropout", "bias")
"""The arguments of nanoGPT's GPTConfig."""


def export(directory: str, target: Path, average: bool = False) -> tuple[int, dict[str, Any]]:
    """Write parameter name → float32 tensor (`average`: of the average of the weights); returns the step and the arguments of nanoGPT's GPTConfig.

    The file is written whole or not at all.

    Raises:
        UsageError: the target cannot be written, or nanoGPT has no such model.
    """
    if target.is_dir() or not target.parent.is_dir():
        raise UsageError(f"{target} cannot be written; name a file in an existing directory, such as gpt.pt")
    model, config, step = load_model(directory, average)
    plain = vars(GPTConfig())
    foreign = [] if config["residual"]["rule"] == "pre_norm" else [f"residual={config['residual']['rule']}"]
    foreign += [
        f"model.{key}={value}" for key, value in config["model"].items() if key not in NANOGPT and value != plain[key]
    ]
    if foreign:
        raise UsageError(
            f"{directory} was trained with {', '.join(foreign)}, which nanoGPT does not have; only GPT-2 itself can be exported"
        )
    switched = [
        key for key in ("qk_norm", "qk_clip", "logit_cap", "head_gate") if config["attention"][key] != plain[key]
    ]
    if switched:
        raise UsageError(
            f"{directory} was trained with attention.{switched[0]}={config['attention'][switched[0]]}, which nanoGPT does not have; "
            "only attention=plain can be exported"
        )
    state = {name: tensor.detach().float().contiguous() for name, tensor in model.state_dict().items()}
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        torch.save(state, temporary)
        os.replace(temporary, target)
    except (OSError, RuntimeError) as error:  # torch answers a full disk with a RuntimeError
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UsageError(
            f"{target} cannot be written ({error}); name a file in another folder or on another disk"
        ) from error
    return step, {key: config["model"][key] for key in NANOGPT}


def work(arguments: list[str]) -> int:
    """Export, and print what was written."""
    others, options = parse(arguments, {"weights": "last"})
    if options["weights"] not in ("last", "average"):
        raise UsageError(f"weights={options['weights']} is neither last nor average; give one of them")
    if len(others) != 2:
        raise UsageError("name a run and the file to write: python scripts/export.py outputs/first gpt.pt")
    step, shape = export(others[0], Path(others[1]), options["weights"] == "average")
    print(f"{others[0]}, step {step} → {others[1]} ({Path(others[1]).stat().st_size / 2**20:.1f} MiB)")
    print(f"GPTConfig({', '.join(f'{key}={value}' for key, value in shape.items())})")
    return 0


main = partial(run, work, __doc__)

if __name__ == "__main__":
    sys.exit(main())
