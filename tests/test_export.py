"""What scripts/export.py writes is read by the programs it is for, and comes back bitwise."""

import json
import math
import os
import struct
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from test_tokenizer import TOKENIZERS

from data.hf_tokenizer import merges, tokenizer_files
from data.shards import DataError
from data.tokenizer import get_tokenizer
from model.convert import NotGPT2, from_hf, from_nanogpt, misfits, take, to_hf, to_nanogpt
from model.gpt import GPT, GPTConfig
from scripts import export
from scripts.analysis.runs import load_model
from scripts.command import UsageError
from training.config import compose
from training.init_from import read_weights
from training.safetensors_file import read_tensors, write_tensors

SHAPE = {"block_size": 16, "vocab_size": 40, "n_layer": 2, "n_head": 2, "n_embd": 16}
GPT2S = {
    "plain": {},
    "biases": {"bias": True},
    "as published": {"bias": True, "mlp": "gelu_tanh"},
    "untied": {"tied": False},
}
needs_transformers = pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
needs_safetensors = pytest.mark.skipif(find_spec("safetensors") is None, reason="safetensors is not installed")


def gpt(**settings):
    """A model whose biases and gains are not those of the start."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SHAPE, **settings})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def tokens():
    return torch.randint(40, (2, 16), generator=torch.Generator().manual_seed(1))


def assert_bitwise(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- Hugging Face ----


@pytest.mark.parametrize("settings", GPT2S.values(), ids=GPT2S)
def test_to_hugging_face_and_back_is_bitwise(settings):
    model = gpt(**settings)
    about, tensors = to_hf(model.config, model.state_dict(), 0)
    assert (
        tensors["transformer.h.1.attn.c_attn.weight"].shape == (16, 48) and "transformer.h.0.mlp.c_fc.bias" in tensors
    )
    fresh = GPT(model.config)
    assert take(from_hf("there", json.loads(json.dumps(about)), tensors), fresh) == []
    assert_bitwise(fresh.state_dict(), model.state_dict())


def read_by_the_format(path):
    """The tensors of a safetensors file: the length of a header, the header, the bytes."""
    whole = path.read_bytes()
    begin = 8 + struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8:begin])
    assert header.pop("__metadata__") == {"format": "pt"} and {entry["dtype"] for entry in header.values()} == {"F32"}
    return {
        name: torch.tensor(struct.unpack(f"<{math.prod(entry['shape'])}f", whole[begin + start : begin + stop])).view(
            entry["shape"]
        )
        for name, entry in header.items()
        for start, stop in [entry["data_offsets"]]
    }


def logits_of_gpt2(about, tensors, tokens):
    """The logits of GPT2LMHeadModel, after transformers' modeling_gpt2.py: its matrices are those of Conv1D, x @ W + b."""

    def norm(name, x):
        weight, bias = (tensors[f"transformer.{name}.{part}"] for part in ("weight", "bias"))
        return F.layer_norm(x, weight.shape, weight, bias, about["layer_norm_epsilon"])

    def conv1d(name, x):
        return x @ tensors[f"transformer.{name}.weight"] + tensors[f"transformer.{name}.bias"]

    tanh = {"gelu": "none", "gelu_new": "tanh"}[about["activation_function"]]
    future = torch.ones(tokens.size(1), tokens.size(1), dtype=torch.bool).triu(1)
    x = tensors["transformer.wte.weight"][tokens] + tensors["transformer.wpe.weight"][: tokens.size(1)]
    for layer in range(about["n_layer"]):
        block = f"h.{layer}"
        parts = conv1d(f"{block}.attn.c_attn", norm(f"{block}.ln_1", x)).split(about["n_embd"], -1)
        q, k, v = (part.unflatten(-1, (about["n_head"], -1)).transpose(1, 2) for part in parts)
        scores = (q @ k.mT / math.sqrt(q.size(-1))).masked_fill(future, -math.inf)
        x = x + conv1d(f"{block}.attn.c_proj", (scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        hidden = F.gelu(conv1d(f"{block}.mlp.c_fc", norm(f"{block}.ln_2", x)), approximate=tanh)
        x = x + conv1d(f"{block}.mlp.c_proj", hidden)
    head = tensors["transformer.wte.weight" if about["tie_word_embeddings"] else "lm_head.weight"]
    return norm("ln_f", x) @ head.T


@pytest.mark.parametrize("settings", GPT2S.values(), ids=GPT2S)
def test_what_is_written_computes_the_same_logits_by_gpt2s_formula(settings, tmp_path):
    model = gpt(**settings)
    export.write_hf(model, "bytes", tmp_path / "hf")
    about = json.loads((tmp_path / "hf/config.json").read_text())
    tensors = read_by_the_format(tmp_path / "hf/model.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(logits_of_gpt2(about, tensors, tokens()), model(tokens())[0], rtol=0, atol=1e-4)


@needs_transformers
@pytest.mark.parametrize("settings", GPT2S.values(), ids=GPT2S)
def test_transformers_computes_the_same_logits(settings, tmp_path):
    from transformers import GPT2LMHeadModel

    model = gpt(**settings)
    export.write_hf(model, "bytes", tmp_path / "hf")
    theirs, loading = GPT2LMHeadModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(tokens()).logits, model(tokens())[0], rtol=0, atol=1e-4)
    tied = theirs.lm_head.weight is theirs.transformer.wte.weight
    assert tied == model.config.tied


@needs_transformers
def test_a_run_becomes_a_folder_that_transformers_generates_text_with(run, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "gpt2"
    assert export.main([str(run), str(folder), "to=hf"]) == 0
    assert "config.json, model.safetensors, tokenizer.json" in capsys.readouterr().out
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor(tokenizer("line 7")["input_ids"])[None]
    ours = load_model(run)[0]
    assert ids.tolist() == [get_tokenizer("bytes").encode("line 7").tolist()]
    longer = theirs.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(longer, ours.generate(ids, 8, temperature=0))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rope": True}, "model.rope=true"),
        ({"mlp": "swiglu"}, "model.mlp=swiglu"),
        ({"mlp": "none", "skips": False}, "model.mlp=none, model.skips=false"),
        ({"qk_norm": True}, "attention.qk_norm=true"),
        ({"logit_cap": 5.0, "head_gate": "token"}, "attention.logit_cap=5.0, attention.head_gate=token"),
        ({"residual": compose(["residual=sandwich_norm"]).residual}, "residual=sandwich_norm"),
    ],
)
def test_what_gpt2_does_not_have_is_refused(settings, said):
    model = gpt(**settings)
    for convert in (
        lambda: to_hf(model.config, model.state_dict(), 0),
        lambda: to_nanogpt(model.config, model.state_dict()),
    ):
        with pytest.raises(NotGPT2, match=said.replace(".", r"\.")):
            convert()
    for settings in (GPT2S["as published"], GPT2S["untied"]):
        with pytest.raises(NotGPT2, match="nanoGPT does not have"):
            to_nanogpt(gpt(**settings).config, {})


# ---- tokenizers ----


@needs_transformers
@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_tokenizer_of_the_folder_is_ours(name, tmp_path):
    from tokenizers import Tokenizer

    ours = get_tokenizer(name)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_files(ours, 16)["tokenizer.json"]))
    theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("", "plain words, don't", "Étude — 文字 🙂\r\n\t  x", "\x00 7777 x=1\n\n\n  if"):
        assert theirs.encode(text).ids == ours.encode(text).tolist()
        assert theirs.decode(theirs.encode(text).ids) == text
    assert theirs.token_to_id("<|endoftext|>") == ours.eot and theirs.get_vocab_size() == ours.vocab_size


def test_merges_are_found_from_the_ids_alone():
    letters = [b"a", b"b", b"c"]
    assert merges([*letters, b"ab", b"abc", b"cab", b""]) == [(b"a", b"b"), (b"ab", b"c"), (b"c", b"ab")]
    with pytest.raises(ValueError, match="not a byte-pair encoding"):
        merges([*letters, b"abc"])


# ---- nanoGPT and safetensors ----


@pytest.mark.parametrize("settings", [GPT2S["plain"], GPT2S["biases"]], ids=["plain", "biases"])
def test_to_nanogpt_and_back_is_bitwise(settings, tmp_path):
    """A state dict, and a checkpoint of nanoGPT: from a compiled model, with its arguments, and with masks of old versions."""
    model = gpt(**settings)
    arguments, state = to_nanogpt(model.config, model.state_dict())
    whole = {f"_orig_mod.{name}": t for name, t in state.items()} | {
        "_orig_mod.transformer.h.0.attn.bias": torch.ones(1, 1, 16, 16)
    }
    for content in (state, {"model": whole, "model_args": arguments, "iter_num": 3}):
        torch.save(content, tmp_path / "gpt.pt")
        fresh = GPT(model.config)
        weights = read_weights(tmp_path / "gpt.pt")
        assert take(weights, fresh) == []
        assert_bitwise(fresh.state_dict(), model.state_dict())
    assert weights.settings["model.n_head"] == 2
    [problem] = misfits(weights, GPTConfig(**{**vars(model.config), "skips": False}))
    assert problem.endswith("set model.skips=true")
    with pytest.raises(NotGPT2, match="holds neither"):
        from_nanogpt("x.pt", {"model": 3})


def test_a_model_that_gpt2_does_not_have_goes_as_safetensors_and_comes_back(run, tmp_path, capsys):
    model = gpt(rope=True, mlp="swiglu", qk_norm=True, tied=True)
    export.write_safetensors(model, "bytes", tmp_path / "m.safetensors")
    weights = read_weights(tmp_path / "m.safetensors")
    assert "lm_head.weight" not in weights.tensors and weights.settings["model.rope"] is True
    fresh = GPT(model.config)
    assert take(weights, fresh) == []
    assert_bitwise(fresh.state_dict(), model.state_dict())
    assert export.main([str(run), str(tmp_path / "run.safetensors"), "to=safetensors"]) == 0
    assert "tensors" in capsys.readouterr().out


@needs_safetensors
def test_the_format_is_that_of_safetensors(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8)
    tensors = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in dtypes}
    tensors |= {"empty": torch.zeros(0, 3), "number": torch.tensor(2.0), "part": torch.arange(9.0)[3:6]}
    write_tensors(tmp_path / "ours", tensors, {"a": "ü"})
    assert_bitwise(load_file(tmp_path / "ours"), tensors)
    with safe_open(tmp_path / "ours", "pt") as file:
        assert file.metadata() == {"format": "pt", "a": "ü"}
    save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "theirs", {"b": "c"})
    back, metadata = read_tensors(tmp_path / "theirs")
    assert_bitwise(back, tensors)
    assert metadata == {"b": "c"}


def test_a_damaged_file_of_tensors_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.arange(100.0)})
    sound = path.read_bytes()
    for damaged in (
        b"",
        sound[:5],
        sound[:40],
        sound[:-7],
        b"\xff" * 300,
        sound.replace(b"F32", b"F99"),
        sound.replace(b"100", b"101"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"x\.safetensors"):
            read_tensors(path)


# ---- the command ----


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{run}", "{tmp}/x", "to=onnx"], "choose one of nanogpt, hf, safetensors"),
        (["{run}", "{tmp}", "to=hf"], "exists already; name a new folder"),
        (["{run}", "{tmp}/none/x", "to=hf"], "existing directory"),
        (["{run}", "{tmp}/x", "format=hf"], "format=hf is no option; choose of to=, weights="),
        (["{run}/checkpoints", "{tmp}/x"], "/checkpoints is a part of a run; name the run itself: {run}\n"),
        (
            ["{run}/checkpoints/step_00000002", "{tmp}/x"],
            "step_00000002 is a part of a run; name the run itself: {run}\n",
        ),
        (["{run}"], "name a run and the file to write"),
        (["{tmp}/gpt.pt", "{run}"], "gpt.pt is no run; the run comes first: python scripts/export.py {run} "),
    ],
)
def test_bad_arguments_are_one_message_and_leave_nothing(run, tmp_path, capsys, arguments, said):
    assert export.main([argument.format(run=run, tmp=tmp_path) for argument in arguments]) == 2
    assert said.format(run=run) in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_weights_are_no_run_and_a_run_begins_with_them(run, tmp_path):
    export.main([str(run), str(tmp_path / "hf"), "to=hf"])
    with pytest.raises(
        UsageError, match=rf"hf holds weights, not a run; train.py init_from={tmp_path}/hf begins a run"
    ):
        load_model(tmp_path / "hf")


def test_only_a_file_is_replaced(run, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    assert export.main([str(run), str(tmp_path / "pipe")]) == 2
    assert "pipe exists already; name a new file" in capsys.readouterr().err and (tmp_path / "pipe").is_fifo()


def test_a_run_below_a_folder_named_checkpoints_is_a_whole_run(tmp_path):
    (tmp_path / "checkpoints/run").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"no checkpoint in .*/checkpoints/run/checkpoints; let the run"):
        load_model(tmp_path / "checkpoints/run")


def test_the_name_of_the_file_may_have_an_equals_sign(run, tmp_path):
    assert export.main([str(run), str(tmp_path / "lr=0.1.pt")]) == 0
    assert export.problems_of_export(["outputs/x", "lr=0.1.pt"], {}) == []
    assert "format=hf is no option" in export.problems_of_export(["outputs/x", "format=hf"], {"to": ""})[0]
    assert "foo=1 is no option" in export.problems_of_export(["foo=1", "gpt.pt"], {})[0]


@pytest.mark.parametrize("to", export.FORMATS)
def test_only_the_folder_with_the_tokenizer_needs_its_vocabulary(run, tmp_path, capsys, monkeypatch, to):
    monkeypatch.setattr(export, "get_tokenizer", without_network)
    refused = to == "hf"
    assert export.main([str(run), str(tmp_path / "x"), f"to={to}"]) == 2 * refused
    assert (tmp_path / "x").exists() != refused == ("no network" in capsys.readouterr().err)


def without_network(name):
    raise DataError("no network")


def test_a_full_disk_leaves_nothing(run, tmp_path, capsys, monkeypatch):
    def full(path, tensors):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "write_tensors", full)
    assert export.main([str(run), str(tmp_path / "hf"), "to=hf"]) == 2
    assert "No space left" in capsys.readouterr().err and not list(tmp_path.iterdir())
