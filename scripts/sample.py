"""Generate text with a trained model.

    python scripts/sample.py outputs/first prompt="def " tokens=200 temperature=0.8 top_k=50 seed=0

The newest good checkpoint is used. temperature=0 takes the likeliest token each time. top_k=0 draws from the whole vocabulary. Without
a prompt the model begins a new document.
"""

from __future__ import annotations

import sys
from functools import partial

import torch

from data.tokenizer import get_tokenizer
from scripts.analysis.runs import load_model
from scripts.command import UsageError, parse, run

SAMPLE_OPTIONS = {"prompt": "", "tokens": 200, "temperature": 0.8, "top_k": 50, "seed": 0}


def sample(directory: str, prompt: str, tokens: int, temperature: float, top_k: int, seed: int) -> str:
    """The prompt and its continuation by `tokens` sampled tokens. The same seed gives the same text on the same device.

    Raises:
        UsageError: a number is impossible, or there is no model in the directory.
    """
    if tokens < 1 or top_k < 0 or not temperature >= 0:
        raise UsageError(
            f"tokens={tokens} must be at least 1, top_k={top_k} and temperature={temperature} at least 0; change that"
        )
    model, config, _ = load_model(directory)
    tokenizer = get_tokenizer(config["data"]["tokenizer"])
    ids = tokenizer.encode(prompt).tolist() or [tokenizer.eot]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    x = torch.tensor([ids], device=device)  # (1, T)
    out = model.to(device).generate(x, tokens, temperature, top_k or None)[0].tolist()
    return tokenizer.decode(out if prompt else out[1:])


def work(arguments: list[str]) -> int:
    """Print a sample."""
    others, options = parse(arguments, SAMPLE_OPTIONS)
    if len(others) != 1:
        raise UsageError(f"name one run and, if you like, {', '.join(f'{k}=' for k in SAMPLE_OPTIONS)}; see --help")
    print(sample(others[0], **options))
    return 0


main = partial(run, work, __doc__)

if __name__ == "__main__":
    sys.exit(main())
