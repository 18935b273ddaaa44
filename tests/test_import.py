"""Runs that start from weights of elsewhere: what is read, what is refused, and what the manifolds change."""

import json
import math
import shutil

import pytest
import torch
from test_export import GPT2S, SHAPE, assert_bitwise, gpt, needs_transformers, tokens

from data.tokenizer import get_tokenizer
from model.convert import NotGPT2, Weights, changed_attention, from_hf, known_settings, misfits, take, to_hf
from model.gpt import GPT, GPTConfig
from optim.manifolds import MANIFOLDS
from scripts.export import write_hf, write_nanogpt, write_safetensors
from train import train
from training.checkpoint import CheckpointError
from training.config import compose
from training.init_from import located, movement, read_weights
from training.log import read_records
from training.validate import ConfigError

BYTES = get_tokenizer("bytes")
TINY = [
    *("model.n_layer=2", "model.n_head=2", "model.n_embd=16", "model.block_size=16", "max_steps=2", "eval_windows=2"),
    *("global_batch_tokens=32", "full_eval=false", "device=cpu", "logger.mode=disabled", "eval_interval=1"),
]


def from_folder(folder, **settings):
    """A model with the weights in a folder."""
    weights = read_weights(folder)
    model = GPT(GPTConfig(**{**SHAPE, **settings})).eval()
    assert misfits(weights, model.config) == [] and take(weights, model) == []
    return model


# ---- GPT-2 of Hugging Face ----


@needs_transformers
@pytest.mark.parametrize("kind", ["head", "no head", "old file"])
def test_a_random_gpt2_of_transformers_has_the_same_logits_here(kind, tmp_path):
    import transformers

    torch.manual_seed(0)
    sizes = {
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 16,
        "n_positions": 16,
        "vocab_size": 40,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
        expected = theirs(tokens()).logits
    (theirs.transformer if kind == "no head" else theirs).save_pretrained(tmp_path / "hf")
    if kind == "old file":
        torch.save(theirs.state_dict(), tmp_path / "hf/pytorch_model.bin")
        (tmp_path / "hf/model.safetensors").unlink()
    ours = from_folder(tmp_path / "hf", bias=True, mlp="gelu_tanh")
    torch.testing.assert_close(ours(tokens())[0], expected, rtol=0, atol=1e-4)


def test_masks_and_names_of_the_published_file(tmp_path):
    """The file of `gpt2` has no prefix, and holds the causal masks of an old program."""
    model = gpt(**GPT2S["as published"])
    about, tensors = to_hf(model.config, model.state_dict(), 0)
    bare = {name.removeprefix("transformer."): t for name, t in tensors.items()}
    masks = {f"h.{i}.attn.{name}": torch.ones(1, 1, 16, 16) for i in range(2) for name in ("bias", "masked_bias")}
    fresh = GPT(model.config)
    assert take(from_hf("gpt2", about, {**bare, **masks}), fresh) == []
    assert_bitwise(fresh.state_dict(), model.state_dict())


def test_a_larger_vocabulary_and_fewer_positions(tmp_path):
    """The rows that are added raise the loss by less than the bound of Jensen's inequality."""
    model = gpt()
    write_hf(model, "bytes", tmp_path / "hf")
    larger = from_folder(tmp_path / "hf", vocab_size=56, block_size=8)
    assert torch.equal(larger.transformer.wpe.weight, model.transformer.wpe.weight[:8])
    x, y = tokens()[:, :8], tokens()[:, 1:9]
    added = (larger(x, y)[1] - model(x, y)[1]).item()
    assert 0 < added < math.log(1 + 16 / 40)
    assert torch.allclose(larger(x)[0][..., :40], model(x)[0], atol=1e-6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "llama"}, "model_type llama"),
        ({"activation_function": "silu"}, "activation_function silu"),
        ({"n_inner": 32}, "n_inner 32"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon 1e-06"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ],
)
def test_another_architecture_is_refused(change, said):
    about, tensors = to_hf(gpt().config, gpt().state_dict(), 0)
    with pytest.raises(NotGPT2, match=said):
        from_hf("there", {**about, **change}, tensors)


def test_attention_may_change_and_the_run_says_so():
    """Settings that no parameter shows: without a word, a model would compute something else than its weights were trained for."""
    plain, capped = GPTConfig(**SHAPE), GPTConfig(**SHAPE, logit_cap=5.0, scale=0.2)
    about, tensors = to_hf(plain, gpt().state_dict(), 0)
    for weights in (from_hf("there", about, tensors), Weights("there", {}, known_settings(plain))):
        assert changed_attention(weights, plain) == [] and misfits(weights, capped) == []
        scale, cap = changed_attention(weights, capped)
        assert scale.startswith("attention.scale=0.2, where the weights had null") and "logit_cap=5.0" in cap
    assert misfits(from_hf("there", about, tensors), GPTConfig(**SHAPE, head_cap=3.0)) == [
        "model.head_cap=3.0 does not fit there; set model.head_cap=null"
    ]


def test_every_setting_that_does_not_fit_is_listed_with_its_remedy():
    model = gpt(**GPT2S["as published"])
    about, tensors = to_hf(model.config, model.state_dict(), 0)
    weights = from_hf("there", about, tensors)
    other = GPTConfig(**{**SHAPE, "n_head": 4, "vocab_size": 30, "block_size": 32}, rope=True)
    assert sorted(misfits(weights, other)) == [
        "model.bias=false does not fit there, whose biases are not zero; set model.bias=true",
        "model.mlp=gelu does not fit there; set model.mlp=gelu_tanh",
        "model.n_head=4 does not fit there; set model.n_head=2",
        "model.rope=true does not fit there; set model.rope=false",
        "model.vocab_size=30 does not fit there; set model.vocab_size=40",
    ]
    [said] = misfits(weights, GPTConfig(**{**SHAPE, "block_size": 32}, mlp="gelu_tanh", bias=True))
    assert said == "model.block_size=32 does not fit there; set model.block_size=16"
    free = GPT(GPTConfig(**SHAPE, mlp="gelu_tanh"))
    before = {name: t.clone() for name, t in free.state_dict().items()}
    assert take(weights, free)[0].endswith("bias: in there, but not in this model")
    assert_bitwise(free.state_dict(), before)


def test_weights_of_another_kind_are_named():
    plain, normed = gpt(), gpt(qk_norm=True)
    weights = Weights("there", dict(normed.state_dict()), known_settings(normed.config))
    assert take(weights, plain)[0] == "transformer.h.0.attn.q_norm.weight: in there, but not in this model"
    weights = Weights("there", dict(plain.state_dict()), {})
    assert "missing in there" in take(weights, normed)[0]
    assert "(16, 16) here, (16, 64) in there" in " ".join(
        take(
            Weights("there", {**plain.state_dict(), "transformer.h.0.attn.c_proj.weight": torch.zeros(16, 64)}, {}),
            plain,
        )
    )


# ---- training from them ----


@pytest.mark.parametrize("assignment", ["hetero", "adamw"])
def test_a_run_starts_from_a_run_on_its_manifolds(run, tiny_data, tmp_path, capsys, assignment):
    source = tmp_path / "source"
    shutil.copytree(run, source)
    more = [
        *tiny_data,
        *TINY,
        f"assignment={assignment}",
        f"output_dir={tmp_path}/run",
        f"init_from={source}",
        "max_steps=1",
        "average=ema",
    ]
    train(compose(more))
    [record] = read_records(tmp_path / "run", "init_from")
    first = next(iter(read_records(tmp_path / "run", "eval")))
    last = [r["loss"] for r in read_records(source, "eval")][-1]
    assert record["loss_before"] == pytest.approx(last, abs=1e-6) and first["loss"] == record["loss"]
    assert first["average_loss"] == first["loss"]
    # The source is on the same manifolds already, so hardly anything moves.
    assert all(by < 1e-5 for by in record["moved"].values())
    printed = capsys.readouterr().out
    assert f"weights of {source}/checkpoints/step_00000002: validation loss {last:.4f}" in printed
    # A resumed run does not read the source again.
    shutil.rmtree(source)
    train(compose([*more, "resume=auto", "max_steps=2", "allow_changes=true"]))
    assert len(list(read_records(tmp_path / "run", "init_from"))) == 1


def test_free_weights_move_onto_the_manifolds_and_the_run_says_how_far(tiny_data, tmp_path, capsys):
    model = GPT(GPTConfig(**{**SHAPE, "vocab_size": 320}))
    write_hf(model, "bytes", tmp_path / "hf")
    arguments = [
        *tiny_data,
        *TINY,
        "assignment=hetero",
        f"output_dir={tmp_path}/run",
        f"init_from={tmp_path}/hf",
        "max_steps=1",
    ]
    train(compose(arguments))
    [record] = read_records(tmp_path / "run", "init_from")
    W = [block.attn.c_attn.weight.detach() for block in model.transformer.h]
    moved = [MANIFOLDS["stiefel"].retract(w) - w for w in W]
    expected = math.sqrt(sum(float(m.square().sum()) for m in moved) / sum(float(w.square().sum()) for w in W))
    assert record["moved"]["transformer.h.0-1.attn.c_attn.weight"] == pytest.approx(expected, rel=1e-4)
    assert set(record["moved"]) == {
        f"transformer.h.0-1.{name}.weight" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert record["loss"] != record["loss_before"] == pytest.approx(math.log(320), abs=0.1)
    printed = capsys.readouterr().out
    assert "after these matrices moved onto their manifolds" in printed
    assert f"  transformer.h.0-1.attn.c_attn.weight  {expected:.4f}  (" in printed


def test_movement_is_over_all_layers_of_a_kind():
    start = {"h.0.a": torch.ones(2, 2), "h.1.a": torch.ones(2, 2), "b": torch.ones(2, 2)}
    now = {**start, "h.1.a": 3 * torch.ones(2, 2)}
    assert movement(start, now) == {"h.0-1.a": (pytest.approx(2**0.5), pytest.approx(5**0.5))}


def test_weights_that_do_not_fit_end_the_run_before_anything_is_written(tiny_data, tmp_path):
    write_safetensors(gpt(rope=True), "bytes", tmp_path / "m.weights")
    with pytest.raises(ConfigError, match=r"model\.rope=false does not fit .*; set model\.rope=true"):
        train(compose([*tiny_data, *TINY, f"output_dir={tmp_path}/run", f"init_from={tmp_path}/m.weights"]))
    assert not (tmp_path / "run/metrics.jsonl").exists() and not (tmp_path / "run/config.yaml").exists()


# ---- sources that cannot be read ----


class Hostile:
    def __reduce__(self):
        return print, ("executed",)


def test_a_source_that_cannot_be_read_is_one_message(run, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "config only").mkdir()
    (tmp_path / "config only/config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (tmp_path / "no json").mkdir()
    (tmp_path / "no json/config.json").write_text("{")
    (tmp_path / "x.safetensors").write_bytes(b"\xff" * 20)
    torch.save({"model": Hostile()}, tmp_path / "hostile.pt")
    (tmp_path / "text.pt").write_text("no weights")
    (tmp_path / "young/checkpoints").mkdir(parents=True)
    causes = {
        "empty": "no config.json",
        "config only": "no model.safetensors",
        "no json": "Expecting property name",
        "x.safetensors": "not a safetensors file",
        "hostile.pt": "more than tensors",
        "text.pt": "more than tensors",
        "young": "no checkpoint yet",
    }
    for name, cause in causes.items():
        with pytest.raises(ConfigError, match=cause) as caught:
            read_weights(tmp_path / name)
        assert "give a run's directory" in str(caught.value)
    write_hf(gpt(**GPT2S["as published"]), "bytes", tmp_path / "hf")
    with pytest.raises(
        ConfigError, match=r"does not say of which model; if config\.json lies beside it, give their folder"
    ):
        read_weights(tmp_path / "hf/model.safetensors")
    for part in ("checkpoints", next((run / "checkpoints").iterdir()).relative_to(run)):
        with pytest.raises(ConfigError, match=f"is a part of a run; init_from={run} takes its newest checkpoint"):
            read_weights(run / part)
    assert "executed" not in capsys.readouterr().out
    damaged = tmp_path / "damaged"
    shutil.copytree(run, damaged)
    next(damaged.glob("checkpoints/*/state.pt")).write_bytes(b"")
    with pytest.raises(CheckpointError):
        read_weights(damaged)


def test_a_name_is_downloaded_and_a_failure_names_the_remedy(tmp_path, monkeypatch, capsys):
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    model = gpt(**GPT2S["as published"])
    write_hf(model, "bytes", tmp_path / "hf")
    asked = []

    def download(repository, file):
        asked.append((repository, file))
        if not (tmp_path / "hf" / file).exists():
            raise EntryNotFoundError(file)
        return str(tmp_path / "hf" / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert located("gpt2-medium") == tmp_path / "hf"
    assert "huggingface.co is asked" in capsys.readouterr().err
    assert asked == [("gpt2-medium", "config.json"), ("gpt2-medium", "model.safetensors")]
    assert_bitwise(from_folder(located("gpt2"), bias=True, mlp="gelu_tanh").state_dict(), model.state_dict())
    (tmp_path / "hf/model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"cannot be had from huggingface\.co .*download the folder elsewhere"):
        located("gpt2")
    assert located(str(tmp_path / "hf")) == tmp_path / "hf"
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)  # a misspelt path is no name
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="init_from=hf/frist: there is no such file"):
        located("hf/frist")


def test_nanogpt_without_arguments_is_known_by_its_tensors(tmp_path):
    write_nanogpt(gpt(), "bytes", tmp_path / "gpt.pt")
    assert_bitwise(from_folder(tmp_path / "gpt.pt").state_dict(), gpt().state_dict())
