"""Generate text with a trained model; it is printed as it is drawn.

    python scripts/sample.py outputs/first prompt="def " tokens=200 temperature=0.8 top_k=50 seed=0
    python scripts/sample.py outputs/first prompts=prompts.txt top_k=0 top_p=0.9       one prompt a line
    python scripts/sample.py outputs/first speed=true                                  and how fast that was

The newest good checkpoint is used. temperature=0 takes the likeliest token each time. top_k=0 draws from the whole vocabulary, and top_p
from the likeliest tokens that together have this probability. Without a prompt the model begins a new document. The same seed gives the
same text on the same device, for each prompt alone. speed=true generates again, with and without the cache of keys and values, as many
tokens as fit into the window (block_size); beyond it, every token has a new position, and the cache is of no use.
"""

from __future__ import annotations

import codecs
import sys
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data.tokenizer import END_OF_TEXT, UNKNOWN, Tokenizer, get_tokenizer
from model.generate import Sampling, possible_temperature, sampled_tokens
from model.gpt import GPT
from scripts.analysis.runs import load_model, require_text
from scripts.command import UsageError, parse, problems_of_run, run

SAMPLE_OPTIONS = {
    "prompt": "",
    "prompts": "",
    "tokens": 200,
    "temperature": 0.8,
    "top_k": 50,
    "top_p": 1.0,
    "seed": 0,
    "speed": False,
}


def text_of(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """The text of tokens, a piece for each as soon as its characters are complete."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    known = tokenizer.token_bytes()
    for token in tokens:
        piece = END_OF_TEXT.encode() if token == tokenizer.eot else UNKNOWN.encode()
        yield decoder.decode(known[token] or piece if token < len(known) else piece)
    yield decoder.decode(b"", final=True)


def continuation(
    model: GPT, tokenizer: Tokenizer, prompt: str, tokens: int, sampling: Sampling, seed: int, cached: bool = True
) -> Iterator[int]:
    """The `tokens` sampled tokens after a prompt, one at a time; after the token between documents if it is empty."""
    ids = tokenizer.encode(prompt).tolist() or [tokenizer.eot]
    torch.manual_seed(seed)
    x = torch.tensor([ids], device=model.lm_head.weight.device)  # (1, T)
    for token in sampled_tokens(model, x, tokens, sampling, cached):
        yield int(token)


def speed(model: GPT, tokenizer: Tokenizer, prompt: str, tokens: int, sampling: Sampling, seed: int) -> str:
    """How many tokens a second are drawn with and without the cache, in words; only of tokens that fit into the window."""
    tokens = max(1, min(tokens, model.config.block_size + 1 - max(1, len(tokenizer.encode(prompt)))))
    rates = []
    for cached in (True, False):
        start = time.perf_counter()
        count = sum(1 for _ in continuation(model, tokenizer, prompt, tokens, sampling, seed, cached))
        rates.append(count / (time.perf_counter() - start))
    return (
        f"{tokens} tokens at {rates[0]:,.0f} tokens/s with the cache of keys and values, {rates[1]:,.0f} without: "
        f"{rates[0] / rates[1]:.1f} times as fast"
    )


def prompts_of(prompt: str, file: str) -> list[str]:
    """The prompt, or those in a file, one a line.

    Raises:
        UsageError: both are given, or the file cannot be read or is empty.
    """
    if not file:
        return [prompt]
    try:
        lines = [line for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UsageError(f"prompts={file} cannot be read ({error}); name a text file with a prompt a line") from error
    if prompt or not lines:
        raise UsageError(
            f"prompts={file} {'is empty' if not lines else 'and prompt='}; give one prompt, or a file of them"
        )
    return lines


def problems_of(others: list[str], options: dict[str, Any]) -> list[str]:
    """A line for everything that is wrong with the command line."""
    wrong = {
        "tokens={tokens} must be at least 1": options["tokens"] < 1,
        "temperature={temperature} must be 0, or from 1e-6 to 1e6": not possible_temperature(options["temperature"]),
        "top_k={top_k} must be at least 0; 0 draws from the whole vocabulary": options["top_k"] < 0,
        "top_p={top_p} must be above 0 and at most 1": not 0 < options["top_p"] <= 1,
        "seed={seed} must be at least 0 and below 2^63": not 0 <= options["seed"] < 2**63,
    }
    return problems_of_run(others, options) + [text.format(**options) for text, holds in wrong.items() if holds]


def work(arguments: list[str]) -> int:
    """Print samples."""
    others, options = parse(arguments, SAMPLE_OPTIONS, problems_of)
    tokens, seed = options["tokens"], options["seed"]
    sampling = Sampling(options["temperature"], options["top_k"] or None, options["top_p"])
    prompts = prompts_of(options["prompt"], options["prompts"])
    model, cfg, _ = load_model(others[0])
    require_text(cfg.data)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = get_tokenizer(cfg.data.tokenizer)
    for number, prompt in enumerate(prompts, 1):
        if len(prompts) > 1:
            print(f"--- prompt {number} of {len(prompts)}")
        print(prompt, end="", flush=True)
        for piece in text_of(tokenizer, continuation(model, tokenizer, prompt, tokens, sampling, seed)):
            print(piece, end="", flush=True)
        print()
    if options["speed"]:
        print(speed(model, tokenizer, prompts[0], tokens, sampling, seed))
    return 0


main = partial(run, work, __doc__)

if __name__ == "__main__":
    sys.exit(main())
