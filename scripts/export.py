"""Write a trained model for other programs.

    python scripts/export.py outputs/first gpt.pt                              to=nanogpt, the default
    python scripts/export.py outputs/first gpt2_folder to=hf
    python scripts/export.py outputs/first model.safetensors to=safetensors
    python scripts/export.py outputs/first gpt.pt weights=average              of a run with average=ema or average=window

nanogpt       a state dict with nanoGPT's names. With the GPTConfig that the command prints:
              GPT(config).load_state_dict(torch.load("gpt.pt"))
hf            a folder with weights, configuration and tokenizer:
              transformers.GPT2LMHeadModel.from_pretrained("gpt2_folder"), AutoTokenizer.from_pretrained("gpt2_folder")
safetensors   every tensor under its name here, for models that the others do not have

An existing file is replaced. An existing folder is refused; for to=hf, so is a file.

All weights are float32. train.py reads each of them back: init_from=<what was written>.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data.hf_tokenizer import tokenizer_files
from data.tokenizer import get_tokenizer
from model.convert import NotGPT2, known_settings, to_hf, to_nanogpt
from model.gpt import GPT
from scripts.analysis.runs import load_model, require_text
from scripts.command import UsageError, parse, problems_of_names, refuse, run
from training.safetensors_file import SETTINGS, write_tensors

EXPORT_OPTIONS = {"to": "nanogpt", "weights": "last"}


def write_nanogpt(model: GPT, tokenizer: str, path: Path) -> str:
    """Write the state dict; returns nanoGPT's GPTConfig. NotGPT2 if nanoGPT has no such model."""
    shape, tensors = to_nanogpt(model.config, model.state_dict())
    torch.save(tensors, path)
    return f"GPTConfig({', '.join(f'{key}={value}' for key, value in shape.items())})"


def write_hf(model: GPT, tokenizer: str, path: Path) -> str:
    """Write the folder; returns its files. NotGPT2 if Hugging Face's GPT-2 has no such model."""
    own = get_tokenizer(tokenizer)
    about, tensors = to_hf(model.config, model.state_dict(), own.eot)
    path.mkdir()
    write_tensors(path / "model.safetensors", tensors)
    for name, content in {"config.json": about, **tokenizer_files(own, model.config.block_size)}.items():
        (path / name).write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    return ", ".join(sorted(file.name for file in path.iterdir()))


def write_safetensors(model: GPT, tokenizer: str, path: Path) -> str:
    """Write all tensors, a tied head once; returns what they are."""
    state = {name: t for name, t in model.state_dict().items() if name not in model.tied_names().values()}
    write_tensors(path, state, {SETTINGS: json.dumps(known_settings(model.config)), "tokenizer": tokenizer})
    return f"{len(state)} tensors"


FORMATS: dict[str, Callable[[GPT, str, Path], str]] = {
    "nanogpt": write_nanogpt,
    "hf": write_hf,
    "safetensors": write_safetensors,
}
"""What writes a model with the tokenizer of a name, by the name that `to=` gives."""


def export(directory: str, target: Path, to: str = "nanogpt", weights: str = "last") -> tuple[int, str]:
    """Write the newest good checkpoint of a run, whole or not at all; returns its step, and what the format says about it.

    weights: "last", or "average", which a run with average=ema or average=window has.

    Raises:
        UsageError: the target cannot be written, or the format has no such model. CheckpointError, DataError: the run cannot be read.
    """
    path = Path(directory)
    wrong = {
        f"{directory} is no run; the run comes first: python scripts/export.py {target} {directory}": path.suffix != ""
        and not path.is_dir()
        and target.is_dir(),
        f"to={to} is no format; choose one of {', '.join(FORMATS)}": to not in FORMATS,
        f"{target} exists already; name a new {'folder' if to == 'hf' else 'file'}": target.is_dir()
        or (target.exists() and (to == "hf" or not target.is_file())),
        f"{target} cannot be written; name a file in an existing directory, such as gpt.pt": not target.absolute().parent.is_dir(),
        f"{target} would hold a state dict of torch; add to=safetensors, or name it {target.stem}.pt": to == "nanogpt"
        and target.suffix == ".safetensors",
        f"weights={weights} is neither last nor average; give one of them": weights not in ("last", "average"),
    }
    refuse([problem for problem, holds in wrong.items() if holds])
    model, cfg, step = load_model(directory, weights == "average")
    if to == "hf":  # whose folder holds the tokenizer too
        require_text(cfg.data)
    temporary = target.with_name(f".{target.name}.tmp")
    _remove(temporary)  # of an attempt that was interrupted
    try:
        remark = FORMATS[to](model, cfg.data.tokenizer, temporary)
        os.replace(temporary, target)
    except NotGPT2 as error:
        raise UsageError(
            f"{directory} was trained with {error}; to=safetensors writes its tensors under the names of this project"
        ) from error
    except (OSError, RuntimeError) as error:  # torch answers a full disk with a RuntimeError
        _remove(temporary)
        raise UsageError(
            f"{target} cannot be written ({error}); name a file in another folder or on another disk"
        ) from error
    return step, remark


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        path.unlink(missing_ok=True)


def problems_of_export(others: list[str], options: dict[str, Any]) -> list[str]:
    """What is wrong with the words besides the options, which must be a run and a file, whose name may have a `=`."""
    if len(others) == 2 and (Path(others[1]).suffix or not others[1].partition("=")[0].isidentifier()):
        return problems_of_names(others[:1], options, 1, "the first word must be a run")
    remedy = "name a run and the file to write: python scripts/export.py outputs/first gpt.pt"
    return problems_of_names(others, options, 2, remedy)


def work(arguments: list[str]) -> int:
    """Export, and print what was written."""
    others, options = parse(arguments, EXPORT_OPTIONS, problems_of_export)
    target = Path(others[1])
    step, remark = export(others[0], target, **options)
    files = [target] if target.is_file() else list(target.iterdir())
    print(f"{others[0]}, step {step} → {target} ({sum(file.stat().st_size for file in files) / 2**20:.1f} MiB)")
    print(remark)
    return 0


main = partial(run, work, __doc__)

if __name__ == "__main__":
    sys.exit(main())
