"""Measure a trained model: loss, perplexity and bits per byte on prepared data, loss by position, and tasks of lm-eval.

    python scripts/evaluate.py outputs/first                                   on the run's own validation split
    python scripts/evaluate.py outputs/first data=data/prepared/books          on any data of the same tokenizer
    python scripts/evaluate.py outputs/first contexts=1,2,4                    with windows of 1, 2 and 4 times the context of training
    python scripts/evaluate.py outputs/first tasks=hellaswag,lambada_openai    by lm-eval: pip install -e '.[eval]'

windows= limits the number of windows (0: the whole split), limit= the examples of a task (0: all); split= is val or train. task_folder=
is a folder of lm-eval's YAML tasks, of which tasks= then names some.

Bits per byte are the losses of all tokens that are text, in bits, divided by the bytes of that text, so that models with different
tokenizers can be compared on the same text. The token between documents has no bytes and is left out.

A run with batches.documents=true is measured as it was trained: tokens attend to their own document.

A longer context needs rotary positions (model.rope=true). Nothing is changed in the model.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.bin import bin_of
from data.loader import validation_windows
from data.settings import Data
from data.shards import MANIFEST, DataError, Dataset, open_dataset
from data.tokenizer import TOKENIZERS, get_tokenizer
from model.gpt import GPT
from scripts.analysis.runs import load_model, require_text
from scripts.analysis.tables import Table
from scripts.command import UsageError, parse, problems_of_run, run
from training.data import open_data, separator_of
from training.overrides import group_choices
from training.settings import Settings

EVALUATE_OPTIONS = {
    "data": "",
    "split": "val",
    "windows": 0,
    "contexts": "1",
    "tasks": "",
    "limit": 0,
    "task_folder": "",
}
_LOGITS = 2**25  # of a forward pass: 128 MiB in float32


@dataclass(frozen=True)
class Measured:
    """What a model loses on windows of T tokens: by position (T,) float64, in nats; bits_per_byte is NaN if no token is text."""

    tokens: int
    by_position: Tensor
    bits_per_byte: float

    @property
    def loss(self) -> float:
        """The mean loss in nats a token."""
        return self.by_position.mean().item()

    def mean_of(self, first: int, last: int) -> float:
        """The mean loss of the positions `first` to `last`, counted from 1."""
        return self.by_position[first - 1 : last].mean().item()


@torch.no_grad()
def measure(model: GPT, windows: np.ndarray, token_bytes: list[bytes]) -> Measured:
    """Measure a model on windows (N, T+1) uint16. token_bytes: the bytes of every id."""
    device, T = model.lm_head.weight.device, windows.shape[1] - 1
    lengths = torch.tensor([len(piece) for piece in token_bytes], dtype=torch.float64, device=device)
    sums = torch.zeros(T, dtype=torch.float64, device=device)
    nats, size = torch.zeros(2, dtype=torch.float64, device=device)
    count = max(1, _LOGITS // (T * model.config.vocab_size))
    for start in range(0, len(windows), count):
        part = torch.from_numpy(windows[start : start + count].astype("int64")).to(device)
        x, y = part[:, :-1], part[:, 1:]
        logits = model.logits(model.features(x)).float()
        losses = F.cross_entropy(logits.mT, y, reduction="none").double()  # (B, T)
        sums += losses.sum(0)
        nats += losses[lengths[y] > 0].sum()
        size += lengths[y].sum()
    return Measured(len(windows) * T, (sums / len(windows)).cpu(), (nats / size / math.log(2)).item())


def token_bytes_of(data: Data) -> list[bytes]:
    """The bytes of every token id; empty ones if they are not known: the vocabulary is not that of the tokenizer
    (data=bin data.vocab_size=...), or it cannot be loaded, which is said on stderr."""
    if data.vocabulary() == TOKENIZERS[data.tokenizer].vocab_size:
        try:
            return get_tokenizer(data.tokenizer).token_bytes()
        except DataError as error:
            print(f"without bits per byte: {error}", file=sys.stderr)
    return [b""] * data.vocabulary()


def position_table(found: dict[int, Measured], trained: int) -> Table:
    """The loss by position, in ranges that double; a column for each length of the windows. `trained`: the context of training."""
    ends = {2**k for k in range(trained.bit_length()) if 2**k < trained} | {trained, *found}
    ranges = [(a + 1, b) for a, b in pairwise([0, *sorted(ends)])]
    lines = []
    for first, last in ranges:
        cells = [f"{m.mean_of(first, last):.4f}" if last <= T else "" for T, m in found.items()]
        lines.append([f"{first}-{last}" if last > first else str(first), *cells])
    return Table(["position", *(f"{T} tokens" for T in found)], lines, [True] * (1 + len(found)))


def summary_table(found: dict[int, Measured]) -> Table:
    """Loss, perplexity and bits per byte for each length of the windows."""
    lines = [
        [f"{T:,}", f"{m.tokens:,}", f"{m.loss:.4f}", f"{math.exp(min(m.loss, 700)):.4g}", _bits(m.bits_per_byte)]
        for T, m in found.items()
    ]
    return Table(["context", "tokens", "loss", "perplexity", "bits per byte"], lines, [True] * 5)


def _bits(bits_per_byte: float) -> str:
    return "" if math.isnan(bits_per_byte) else f"{bits_per_byte:.4f}"


def data_of(cfg: Settings, folder: str) -> Dataset:
    """The data in a folder, prepared or as data=bin reads it, or that of the run.

    Raises:
        UsageError: there is none, or it was prepared with another tokenizer. DataError: it cannot be read.
    """
    if not folder:
        return open_data(cfg)
    path, wanted = Path(folder), cfg.data.tokenizer
    if not path.exists():
        name = path.name if path.name in group_choices("data") else "<name>"
        raise UsageError(
            f"there is no prepared data in {folder}; give the folder of some, such as data=data/prepared/{name}, which "
            f"python -m data.prepare data={name} data.tokenizer={wanted} makes"
        )
    if not (path / MANIFEST).exists() and any(path.glob("*.bin")):
        return bin_of(path, tokenizer=wanted, vocab_size=cfg.data.vocabulary()).open()
    if path.is_file() and path.suffix == ".bin":
        raise UsageError(f"data={folder} is a file of tokens; give its folder: data={path.parent}")
    if not (path / MANIFEST).exists():
        text = f"{folder}/*.txt" if path.is_dir() else folder
        raise UsageError(
            f"data={folder} is no prepared data; prepare text with: python -m data.prepare data=text data.name=mine "
            f"data.tokenizer={wanted} data.files=<any other text> 'data.val_files={text}', and give data=data/prepared/mine"
        )
    dataset = open_dataset(folder)
    if dataset.tokenizer != wanted:
        raise UsageError(
            f"{folder} holds {dataset.tokenizer} tokens, and the model reads {wanted}; prepare the same text with "
            f"data.tokenizer={wanted} in another data.dir, and compare bits per byte"
        )
    return dataset


def multiples_of(contexts: str) -> list[int]:
    """The multiples of the context of training that a text such as "1,2,4" names, sorted; empty if it is no such text."""
    try:
        multiples = sorted({int(word) for word in contexts.split(",")})
    except ValueError:
        return []
    return multiples if multiples[0] > 0 else []


def problems_of(others: list[str], options: dict[str, Any]) -> list[str]:
    """A line for everything that is wrong with the command line."""
    found = problems_of_run(others, options)
    if not multiples_of(options["contexts"]):
        found.append(
            f"contexts={options['contexts']} is not a list of whole numbers above 0; give one, such as contexts=1,2,4"
        )
    found += [f"{key}={options[key]} is below 0; 0 means all" for key in ("windows", "limit") if options[key] < 0]
    if options["split"] not in ("val", "train"):
        found.append(f"split={options['split']} is no split; split is val or train")
    found += [
        f"{key}= is for tasks; name some with tasks="
        for key in ("limit", "task_folder")
        if options[key] and not options["tasks"]
    ]
    if options["tasks"] and find_spec("lm_eval") is None:
        found.append("tasks= needs lm-eval, which is not installed; get it with: pip install -e '.[eval]'")
    return found


def work(arguments: list[str]) -> int:
    """Print the tables."""
    others, options = parse(arguments, EVALUATE_OPTIONS, problems_of)
    model, cfg, step = load_model(others[0])
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    dataset = data_of(cfg, options["data"])
    model.separator = separator_of(cfg, dataset)
    found, token_bytes = {}, token_bytes_of(cfg.data)
    for T in (multiple * model.config.block_size for multiple in multiples_of(options["contexts"])):
        try:
            longer = model.with_context(T)
        except ValueError as error:
            raise UsageError(f"{others[0]}: {error}") from error
        windows = validation_windows(getattr(dataset, options["split"]), T, options["windows"] or None)
        found[T] = measure(longer, windows, token_bytes)
    print(
        f"{others[0]}, step {step}, on {options['split']} of {options['data'] or cfg.data.name}, loss in nats a token"
    )
    print(summary_table(found).text(), position_table(found, model.config.block_size).text(), sep="\n\n")
    if options["tasks"]:
        require_text(cfg.data)
        from scripts.harness import evaluate_tasks  # lm-eval takes seconds to import

        limit, folder = options["limit"] or None, options["task_folder"] or None
        results = evaluate_tasks(model, get_tokenizer(cfg.data.tokenizer), options["tasks"].split(","), limit, folder)
        lines = [
            [task, metric, f"{value:.4f}", "" if error is None else f"{error:.4f}"]
            for task, metric, value, error in results
        ]
        print("", Table(["task", "metric", "value", "error"], lines, [False, False, True, True]).text(), sep="\n")
    return 0


main = partial(run, work, __doc__)

if __name__ == "__main__":
    sys.exit(main())
