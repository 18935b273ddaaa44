"""A model of this project for lm-eval, EleutherAI's harness (github.com/EleutherAI/lm-evaluation-harness): pip install -e '.[eval]'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lm_eval
import torch
import torch.nn.functional as F
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager

from data.tokenizer import Tokenizer
from model.generate import Sampling, sampled_tokens
from model.gpt import GPT
from scripts.command import UsageError

_TOKENS = 2**14  # of a forward pass
_NEW_TOKENS = 256  # of a text, if its task does not say


class Harness(TemplateLM):
    """Answers lm-eval's three kinds of requests with a GPT, on the device of the model, in evaluation mode."""

    def __init__(self, model: GPT, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.model, self.ours = model, tokenizer
        self._device = model.lm_head.weight.device

    @property
    def eot_token_id(self) -> int:
        """The token between documents, on which a text without context depends."""
        return self.ours.eot

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text; no special token is added."""
        return self.ours.encode(string).tolist()

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Of each (texts, context, continuation): the log-likelihood of the continuation, and whether greedy decoding would give it."""
        return self.scores([(context + continuation, len(context)) for _, context, continuation in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text, after the token between documents."""
        texts = [[self.eot_token_id, *self.tok_encode(request.args[0])] for request in requests]
        return [score for score, _ in self.scores([(ids, 1) for ids in texts])]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """For each (context, settings) the text that follows, up to the first of the words in `until`."""
        return [self._text(context, settings) for context, settings in (request.args for request in requests)]

    def _text(self, context: str, settings: dict[str, Any]) -> str:
        ends = settings.get("until") or []
        ends = [ends] if isinstance(ends, str) else ends
        drawn = settings.get("do_sample") or settings.get("temperature", 0) > 0
        sampling = Sampling(
            settings.get("temperature", 1.0) if drawn else 0, settings.get("top_k"), settings.get("top_p", 1.0)
        )
        x = torch.tensor([self.tok_encode(context) or [self.eot_token_id]], device=self._device)
        found: list[int] = []
        for token in sampled_tokens(self.model, x, settings.get("max_gen_toks", _NEW_TOKENS), sampling):
            if (new := int(token)) == self.eot_token_id:
                break
            found.append(new)
            text = self.ours.decode(found)
            if any(end in text for end in ends):
                return min((text.split(end)[0] for end in ends), key=len)
        return self.ours.decode(found)

    @torch.no_grad()
    def scores(self, items: Sequence[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        """For each (ids, start): Σ log p(ids[i] | before) over i ≥ start ≥ 1 (nats), and whether each is the most likely token.

        Every token is predicted once. If they do not fit into one window, each window predicts as many as it can, and the last one has a
        full context: lm-eval's rolling windows.
        """
        block = self.model.config.block_size
        cut = [
            (i, ids[max(0, stop - 1 - block) : stop], stop - first)
            for i, (ids, start) in enumerate(items)
            for first in range(start, len(ids), block)
            for stop in (min(first + block, len(ids)),)
        ]  # of which item, inputs and targets together, how many of the last are predicted
        cut.sort(key=lambda part: len(part[1]))
        sums, greedy = [0.0] * len(items), [True] * len(items)
        size = max(1, _TOKENS // block)
        for batch in (cut[at : at + size] for at in range(0, len(cut), size)):
            longest = len(batch[-1][1])
            rows = [
                ids + [0] * (longest - len(ids)) for _, ids, _ in batch
            ]  # what follows a text changes nothing in it
            tokens = torch.tensor(rows, device=self._device)
            h = self.model.features(tokens[:, :-1])
            for row, (i, ids, count) in enumerate(batch):
                here = slice(len(ids) - 1 - count, len(ids) - 1)
                logits = self.model.logits(h[row, here]).float()
                targets = tokens[row, 1:][here]
                sums[i] -= F.cross_entropy(logits, targets, reduction="sum").item()
                greedy[i] &= bool((logits.argmax(-1) == targets).all())
        return list(zip(sums, greedy))


def evaluate_tasks(
    model: GPT, tokenizer: Tokenizer, tasks: Sequence[str], limit: int | None = None, folder: str | None = None
) -> list[tuple[str, str, float, float | None]]:
    """Task, metric, value and standard error (None: unknown) of each result of lm-eval.

    Args:
        tasks: names of lm-eval's tasks, such as hellaswag and lambada_openai. limit: the number of examples of each; None: all.
        folder: holds tasks as YAML files; then no others are known.

    Raises:
        UsageError: a task is unknown, or its examples cannot be loaded.
    """
    manager = TaskManager(include_path=folder, include_defaults=folder is None)
    if unknown := [name for name in tasks if name not in manager.all_tasks]:
        raise UsageError(f"lm-eval has no task {', '.join(unknown)}; its names are listed by: lm-eval ls tasks")
    asked: dict[str, Any] = {"tasks": list(tasks), "task_manager": manager, "limit": limit, "bootstrap_iters": 1000}
    try:
        found = lm_eval.simple_evaluate(Harness(model, tokenizer), **asked, log_samples=False)
    except OSError as error:  # of files and of the network
        cause = " ".join(str(error).split())
        raise UsageError(
            f"the examples of {', '.join(tasks)} cannot be loaded ({type(error).__name__}: {cause}); connect to the network once, "
            "or name tasks whose data is here with task_folder="
        ) from error
    lines = []
    for task, values in found["results"].items():
        for key, value in values.items():
            metric, _, variant = key.partition(",")
            if isinstance(value, (int, float)) and variant and not metric.endswith("_stderr"):
                error_of = values.get(f"{metric}_stderr,{variant}")
                lines.append((task, metric, float(value), error_of if isinstance(error_of, float) else None))
    return lines
