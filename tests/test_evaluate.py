"""scripts/evaluate.py: losses by position, bits per byte, longer contexts, and lm-eval's tasks."""

import json
import math
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_export import gpt
from test_import import TINY

from data.prepare import prepare
from data.shards import DataError
from data.tokenizer import get_tokenizer
from scripts import evaluate, export
from scripts.analysis.runs import load_model
from train import train
from training.config import compose
from training.log import read_records

BYTES = get_tokenizer("bytes")
NGPT = {"rope": True, "mlp": "swiglu", "tied": False, "unit_weights": True}
needs_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed (extra eval)")


def windows_of(count, length):
    return np.random.default_rng(0).integers(0, 40, (count, length + 1)).astype("uint16")


def test_the_losses_are_those_of_the_model(monkeypatch):
    model, windows = gpt(), windows_of(7, 16)
    monkeypatch.setattr(evaluate, "_LOGITS", 2 * 16 * 40)  # two windows at a time, the last alone
    pieces = [b"ab", b"", *([b"x"] * 38)]  # a token of two bytes, one between documents
    found = evaluate.measure(model, windows, pieces)
    x = torch.from_numpy(windows.astype("int64"))
    losses = F.cross_entropy(model(x[:, :-1])[0].mT, x[:, 1:], reduction="none")
    assert found.tokens == 7 * 16 and found.loss == pytest.approx(model(x[:, :-1], x[:, 1:])[1].item(), abs=1e-6)
    torch.testing.assert_close(found.by_position, losses.mean(0).double(), rtol=0, atol=1e-6)
    text = x[:, 1:] != 1
    size = text.sum() + (x[:, 1:] == 0).sum()
    assert found.bits_per_byte == pytest.approx((losses[text].sum() / size / math.log(2)).item(), rel=1e-6)
    assert found.mean_of(5, 8) == pytest.approx(losses[:, 4:8].mean().item(), abs=1e-6)


def test_bits_per_byte_of_bytes_are_the_loss_in_bits():
    found = evaluate.measure(gpt(), windows_of(3, 16), BYTES.token_bytes())
    assert found.bits_per_byte == pytest.approx(found.loss / math.log(2))


def test_tokens_of_a_vocabulary_that_is_not_known_have_no_bytes():
    own = compose(["data=bin", "data.dir=nowhere", "data.vocab_size=40", "model.vocab_size=40"]).data
    assert evaluate.token_bytes_of(own) == [b""] * 40
    assert math.isnan(evaluate.measure(gpt(), windows_of(3, 16), evaluate.token_bytes_of(own)).bits_per_byte)
    assert evaluate.token_bytes_of(compose(["data=stdlib"]).data) == BYTES.token_bytes()


def test_without_the_vocabulary_there_are_no_bits_per_byte(monkeypatch, capsys):
    def without_network(name):
        raise DataError("no network")

    monkeypatch.setattr(evaluate, "get_tokenizer", without_network)
    assert evaluate.token_bytes_of(compose(["data=stdlib"]).data) == [b""] * 257
    assert capsys.readouterr().err == "without bits per byte: no network\n"
    assert evaluate.summary_table({4: evaluate.Measured(8, torch.ones(4), math.nan)}).lines[0][-1] == ""


@pytest.mark.parametrize("settings", [{"rope": True}, NGPT], ids=["rotary", "nGPT"])
def test_a_longer_context_reads_the_same_beginning(settings):
    model = gpt(**settings)
    before = torch.get_rng_state()
    longer = model.with_context(64)
    assert torch.equal(before, torch.get_rng_state())
    x = torch.randint(40, (2, 64))
    assert longer is not model and model.with_context(16) is model
    torch.testing.assert_close(longer.features(x)[:, :16], model.features(x[:, :16]), rtol=1e-4, atol=1e-5)
    assert longer.features(x).isfinite().all()
    caches = longer.new_caches()
    stepwise = torch.cat([longer.features(part, caches) for part in x.split(8, 1)], 1)
    torch.testing.assert_close(stepwise, longer.features(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"rope": True, "head_gate": "position"}], ids=["table", "gates"])
def test_learned_positions_cannot_be_continued(settings):
    with pytest.raises(ValueError, match=r"every position is learned; train with rotary"):
        gpt(**settings).with_context(17)


def test_the_ranges_of_positions_double():
    found = {T: evaluate.Measured(T, torch.arange(1.0, T + 1).double(), 1.0) for T in (12, 24)}
    table = evaluate.position_table(found, 12)
    assert [line[0] for line in table.lines] == ["1", "2", "3-4", "5-8", "9-12", "13-24"]
    assert table.lines[-2][1:] == ["10.5000", "10.5000"] and table.lines[-1][1:] == ["", "18.5000"]
    assert table.headings == ["position", "12 tokens", "24 tokens"]


# ---- the command ----


def test_a_run_is_measured_as_it_measured_itself(run, tiny_data, capsys):
    assert evaluate.main([str(run), "windows=2"]) == 0
    out = capsys.readouterr().out
    last = [r["loss"] for r in read_records(run, "eval")][-1]
    row = next(line.split() for line in out.splitlines() if line.split()[:2] == ["16", "32"])
    assert float(row[2]) == pytest.approx(last, abs=1e-4)
    assert float(row[4]) == pytest.approx(last / math.log(2), abs=2e-4)
    assert "9-16" in out


def test_other_data_and_longer_contexts(tiny_data, tmp_path, capsys):
    folder, arguments = tmp_path / "run", [*tiny_data, *TINY, f"output_dir={tmp_path}/run"]
    train(compose([*arguments, "model.rope=true", "max_steps=1"]))
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"other words {name}, and other words again. " * 200)
    other = ["data=text", f"data.files=[{tmp_path}/a.txt]", f"data.val_files=[{tmp_path}/b.txt]"]
    prepare(compose([*other, f"data.dir={tmp_path}/other", "data.tokenizer=bytes"]).data, progress=False)
    capsys.readouterr()
    assert evaluate.main([str(folder), f"data={tmp_path}/other", "contexts=1,2,4", "split=train"]) == 0
    out = capsys.readouterr().out
    assert "33-64" in out and "64 tokens" in out and f"on train of {tmp_path}/other" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name one run"),
        (["{run}", "split=test"], "split is val or train"),
        (["{run}", "contexts=1,x"], "whole numbers above 0"),
        (
            ["{run}", "contexts=0", "windows=-1"],
            "whole numbers above 0; give one, such as contexts=1,2,4\nwindows=-1 is below 0",
        ),
        (["{run}", "contexts=2"], "every position is learned"),
        (
            ["{run}", "foo=1", "windows=many", "split=test"],
            "whole number; give one, such as windows=0\nfoo=1 is no option; choose",
        ),
        (["{run}", "data={tmp}/none"], "there is no prepared data"),
        (
            ["{run}", "data=books"],
            "such as data=data/prepared/books, which python -m data.prepare data=books data.tokenizer=bytes",
        ),
        (["{run}", "data={run}/config.yaml"], "is no prepared data; prepare text with: python -m data.prepare"),
        (["{run}", "tasks=hellaswag"], "pip install -e '.[eval]'"),
    ],
)
def test_mistakes_are_one_message(run, tmp_path, capsys, monkeypatch, arguments, said):
    monkeypatch.setattr(evaluate, "find_spec", lambda name: None)
    assert evaluate.main([argument.format(run=run, tmp=tmp_path) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert said in err and "Traceback" not in err and not out


@pytest.mark.parametrize(
    "settings",
    [
        ["batches.documents=true", "probe.interval=null", "model.rope=true"],
        ["model.head_cap=0.1", "model.tied=false", "model.head_bias=true", "model.rope=true"],
    ],
    ids=["documents", "head"],
)
def test_what_changes_the_loss_is_measured_too(tiny_data, tmp_path, capsys, settings):
    folder = tmp_path / "run"
    train(compose([*tiny_data, *TINY, *settings, f"output_dir={folder}", "max_steps=1"]))
    last = [r["loss"] for r in read_records(folder, "eval")][-1]
    capsys.readouterr()
    assert evaluate.main([str(folder), "windows=2", "contexts=1,2"]) == 0
    row = next(line.split() for line in capsys.readouterr().out.splitlines() if line.split()[:2] == ["16", "32"])
    assert float(row[2]) == pytest.approx(last, abs=1e-4)


def test_a_file_of_tokens_is_named_by_its_folder(run, tmp_path, capsys):
    np.zeros(100, "<u2").tofile(tmp_path / "val.bin")
    assert evaluate.main([str(run), f"data={tmp_path}/val.bin"]) == 2
    assert f"is a file of tokens; give its folder: data={tmp_path}\n" in capsys.readouterr().err


def test_files_of_other_programs_are_measured(run, tmp_path, capsys):
    for name in ("train", "val"):
        np.random.default_rng(0).integers(0, 256, 100).astype("<u2").tofile(tmp_path / f"{name}.bin")
    assert evaluate.main([str(run), f"data={tmp_path}"]) == 0
    assert f"on val of {tmp_path}" in capsys.readouterr().out


def test_data_of_another_tokenizer_is_refused(run, tiny_data, tmp_path, monkeypatch):
    cfg = load_model(run)[1]
    dataset = evaluate.open_dataset(cfg.data.dir)
    other = replace(dataset, tokenizer="gpt2")
    monkeypatch.setattr(evaluate, "open_dataset", lambda folder: other)
    with pytest.raises(
        evaluate.UsageError, match=r"holds gpt2 tokens, and the model reads bytes; .*data\.tokenizer=bytes"
    ):
        evaluate.data_of(cfg, cfg.data.dir)


# ---- lm-eval ----


def harness():
    from scripts.harness import Harness

    torch.manual_seed(0)
    model = gpt(vocab_size=320)
    return Harness(model, BYTES), model


def request(*arguments):
    return type("Request", (), {"args": arguments})()


def log_probability(model, ids, start):
    """Token by token, each with as much context as fits."""
    total, greedy = 0.0, True
    for i in range(start, len(ids)):
        # The windows of a text are cut every block_size targets; the last window ends at the end of the text.
        stop = min(start + ((i - start) // 16 + 1) * 16, len(ids))
        first = max(0, stop - 1 - 16)
        logits = model(torch.tensor([ids[first : stop - 1]]))[0][0, i - 1 - first]
        total += torch.log_softmax(logits, -1)[ids[i]].item()
        greedy &= int(logits.argmax()) == ids[i]
    return total, greedy


@needs_lm_eval
def test_log_likelihoods_are_sums_over_tokens():
    answers, model = harness()
    pairs = [
        ("the ", "cat"),
        ("", "dog"),
        ("a long text before it, ", "and a continuation longer than the window"),
        ("x", "y"),
    ]
    found = answers.loglikelihood([request(*pair) for pair in pairs], disable_tqdm=True)
    for (context, text), (score, greedy) in zip(pairs, found):
        ids = list((context + text).encode())
        start = len(context.rstrip().encode())
        ids, start = (ids, start) if start else ([256, *ids], 1)
        expected = log_probability(model, ids, start)
        assert score == pytest.approx(expected[0], rel=1e-4) and greedy == expected[1]
    [rolling] = answers.loglikelihood_rolling([request("a text that is longer than one window, by far")])
    assert rolling == pytest.approx(
        log_probability(model, [256, *b"a text that is longer than one window, by far"], 1)[0], rel=1e-4
    )


@needs_lm_eval
def test_greedy_answers_are_their_own_continuation_and_stop():
    answers, model = harness()
    [text] = answers.generate_until([request("abc", {"until": [], "max_gen_toks": 6})])
    ids = model.generate(torch.tensor([list(b"abc")]), 6, temperature=0)[0, 3:].tolist()
    assert text == BYTES.decode(ids[: ids.index(256)] if 256 in ids else ids)
    if len(text) > 2:
        [cut] = answers.generate_until([request("abc", {"until": [text[2]], "max_gen_toks": 6})])
        assert cut == text.split(text[2])[0]


@needs_lm_eval
@pytest.mark.skipif(
    not all(map(find_spec, ("transformers", "accelerate"))), reason="transformers or accelerate is not installed"
)
def test_lm_eval_finds_the_same_in_the_folder_for_hugging_face(run, tmp_path):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from scripts.harness import Harness

    assert export.main([str(run), str(tmp_path / "hf"), "to=hf"]) == 0
    theirs = HFLM(pretrained=str(tmp_path / "hf"), device="cpu", dtype="float32")
    pairs = [("line 1", " says"), ("x", "y"), ("", "line"), ("line ", "2")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    found = [answers.loglikelihood(requests) for answers in (Harness(load_model(run)[0], BYTES), theirs)]
    for (ours, greedy), (other, other_greedy) in zip(*found):
        assert ours == pytest.approx(other, abs=1e-4) and greedy == other_greedy


@needs_lm_eval
def test_a_tiny_task_runs_without_a_network(run, tmp_path, capsys):
    lines = [{"question": f"line {i} says", "choices": [" that", " xx", " yy"], "label": 0} for i in range(4)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "tiny.yaml").write_text(
        "task: tiny_choice\ndataset_path: json\ntest_split: test\noutput_type: multiple_choice\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tmp_path}/data.jsonl\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{label}}"\n'
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    assert evaluate.main([str(run), "windows=1", "tasks=tiny_choice", f"task_folder={tmp_path}", "limit=3"]) == 0
    row = next(line.split() for line in capsys.readouterr().out.splitlines() if "tiny_choice" in line)
    assert row[1] == "acc" and 0 <= float(row[2]) <= 1
    assert evaluate.main([str(run), "windows=1", "tasks=none", f"task_folder={tmp_path}"]) == 2
    assert "lm-eval has no task none" in capsys.readouterr().err
