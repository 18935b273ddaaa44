"""scripts/sample.py: text as it is drawn, from one prompt or a file of them."""

import io
import sys

import pytest
import torch
from test_tokenizer import TOKENIZERS

from data.tokenizer import get_tokenizer
from scripts import sample
from scripts.analysis.runs import load_model, require_text
from scripts.command import UsageError
from training.config import compose


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_are_the_text_and_no_character_is_cut(name):
    tokenizer = get_tokenizer(name)
    text = "Étude — 文字 🙂 plain"
    ids = [
        *tokenizer.encode(text).tolist(),
        tokenizer.eot,
        tokenizer.vocab_size + 3,
        *tokenizer.encode("文").tolist()[:2],
    ]
    pieces = list(sample.text_of(tokenizer, ids))
    assert "".join(pieces) == tokenizer.decode(ids)
    assert "".join(sample.text_of(tokenizer, tokenizer.encode(text).tolist())) == text


def test_a_sample_is_that_of_generate_and_prompts_do_not_change_each_other(run, tmp_path, capsys):
    model, tokenizer = load_model(run)[0], get_tokenizer("bytes")
    texts = {}
    for prompt in ("line 1 = ", "says"):
        torch.manual_seed(3)
        ids = model.generate(torch.tensor([tokenizer.encode(prompt).tolist()]), 30, temperature=0.9, top_k=9)
        texts[prompt] = tokenizer.decode(ids[0].tolist())
        assert sample.main([str(run), f"prompt={prompt}", "tokens=30", "temperature=0.9", "top_k=9", "seed=3"]) == 0
        assert capsys.readouterr().out == texts[prompt] + "\n"
    (tmp_path / "p.txt").write_text("line 1 = \n\nsays\n")
    arguments = ["tokens=30", "temperature=0.9", "top_k=9", "seed=3", "speed=true"]
    assert sample.main([str(run), f"prompts={tmp_path}/p.txt", *arguments]) == 0
    said = capsys.readouterr().out
    assert said.startswith("--- prompt 1 of 2\n{}\n--- prompt 2 of 2\n{}\n".format(*texts.values()))
    assert "tokens/s with the cache of keys and values" in said.splitlines()[-1]


def test_text_is_printed_while_it_is_drawn(run, monkeypatch):
    drawn, printed = [], []

    class Screen(io.StringIO):
        def write(self, text):
            printed.append((len(drawn), text))
            return len(text)

    original = sample.sampled_tokens
    monkeypatch.setattr(sample, "sampled_tokens", lambda *args: (drawn.append(1) or token for token in original(*args)))
    monkeypatch.setattr(sys, "stdout", Screen())
    assert sample.main([str(run), "tokens=5", "temperature=0"]) == 0
    assert {count for count, text in printed if text} >= {1, 2, 3, 4, 5}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["top_p=0", "tokens=0"], "tokens=0 must be at least 1\ntop_p=0.0 must be above 0"),
        (["speed=fast"], "true or false"),
        (["foo=1"], "foo=1 is no option; choose of prompt=, prompts=, tokens="),
        (["tokns=9", "top_k=-1"], "tokns= is no option; did you mean tokens=?\ntop_k=-1 must be at least 0"),
        (
            ["temperature=-1", "top_k=0", "top_p=2", "seed=x"],
            "seed=x is not a whole number; give one, such as seed=0\n"
            "temperature=-1.0 must be 0, or from 1e-6 to 1e6\ntop_p=2.0 must be above 0 and at most 1\n",
        ),
        (["prompts={tmp}/none.txt"], "cannot be read"),
        (["prompts={tmp}/empty.txt"], "is empty"),
        (["prompts={tmp}/one.txt", "prompt=x"], "give one prompt, or a file"),
    ],
)
def test_mistakes_are_one_message(run, tmp_path, capsys, arguments, said):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "one.txt").write_text("a\n")
    assert sample.main([str(run), *(argument.format(tmp=tmp_path) for argument in arguments)]) == 2
    out, err = capsys.readouterr()
    assert said in err and not out


def test_ids_without_a_known_text_are_refused(tmp_path):
    data = compose(["data=bin", f"data.dir={tmp_path}", "data.vocab_size=65", "data.tokenizer=bytes"]).data
    with pytest.raises(UsageError, match=r"data\.vocab_size=65, and bytes has 257"):
        require_text(data)
    require_text(compose([]).data)
