"""The backend of attention: chosen by a measurement, part of the run, and compiled without a break."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from device_checks import settings, windows
from torch._dynamo.backends.common import aot_autograd

import train as module
from model.gpt import GPT
from train import train
from training import attention, checkpoint
from training.attention import Backend, choose
from training.build import gpt_config
from training.config import compose
from training.log import read_records
from training.start import machine
from training.validate import ConfigError

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_the_backend_is_in_the_compiled_program():
    """Without a graph break. By itself torch takes flash."""
    torch._dynamo.reset()
    model, seen = GPT(gpt_config(settings())), []

    def look(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    model.attend_by("math", torch.float32)
    x = torch.from_numpy(windows(2)[:, :-1].astype("int64"))
    torch.compile(model, backend=aot_autograd(fw_compiler=look), fullgraph=True, dynamic=False)(x, x)
    assert any("_safe_softmax" in target for target in seen) and not any("flash" in target for target in seen)
    assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.math_sdp_enabled()


def test_the_start_of_a_run_names_device_dtype_and_backend(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    ranks, backend = SimpleNamespace(world=8, device=CUDA), Backend("cudnn", torch.bfloat16)
    assert machine(settings(), ranks, backend) == "8 ranks on GPU 0, bfloat16, attention by cudnn"
    ranks, capped = SimpleNamespace(world=1, device=CPU), settings("attention.logit_cap=30")
    assert re.fullmatch(
        r"CPU .*, \d+ threads?, float32, explicit attention", machine(capped, ranks, choose(capped, CPU, 3))
    )


def test_only_queries_of_the_measured_dtype_without_a_mask_are_computed_by_it():
    """A probe computes in float32, and a cache masks."""
    model = GPT(gpt_config(settings())).eval()
    x = torch.from_numpy(windows(2)[:, :-1].astype("int64"))
    expected = model(x)[0]
    model.attend_by("cudnn", torch.bfloat16)  # which a CPU refuses
    assert torch.equal(model(x)[0], expected)

    def behind_a_cache(backend):
        caches = model.new_caches()
        model.attend_by(None, torch.float32)
        model.features(x[:, :8], caches)
        model.attend_by(backend, torch.float32)
        return model.features(x[:, 8:], caches)

    assert torch.equal(behind_a_cache("cudnn"), behind_a_cache(None))


def test_the_fastest_that_is_not_refused_is_chosen(monkeypatch):
    seconds = {"flash": [2.5, 2.0], "cudnn": [1.0, 1.0], "efficient": [3.0, 3.5]}
    monkeypatch.setattr(attention, "refusal", lambda name, *_: "too wide" if name == "cudnn" else None)
    monkeypatch.setattr(attention, "_inputs", lambda *_: ())
    monkeypatch.setattr(attention, "_seconds", lambda calls, _: {name: seconds[name] for name in calls})
    found = choose(settings("dtype=bfloat16"), CUDA, 3)
    assert found == Backend("flash", torch.bfloat16, {"flash": 2.0, "cudnn": None, "efficient": 3.0})
    assert "flash 2e+03 ms, cudnn refused" in found.record()["message"]
    monkeypatch.setattr(attention, "refusal", lambda name, *_: "too wide")
    attention.measured.cache_clear()
    assert choose(settings("dtype=bfloat16"), CUDA, 3).backend is None
    attention.measured.cache_clear()


def test_there_is_nothing_to_choose_on_a_cpu_and_where_attention_is_explicit():
    """And so nothing is measured, which would fail here."""
    for cfg, device in ((settings(), CPU), (settings("attention=soft_cap"), CUDA)):
        assert choose(cfg, device, 3) == Backend(None, torch.float32)


def test_backends_are_measured_as_they_are():
    found = attention.measured((2, 16, 2, 8), torch.float32, 0.0, CPU)
    assert found.backend == "flash" and found.seconds["flash"] > 0
    assert found.seconds["cudnn"] is found.seconds["efficient"] is None


def test_a_refused_backend_names_a_remedy():
    with pytest.raises(ConfigError, match=r"the backend cudnn does not accept .* use attention_backend=auto"):
        choose(settings("attention_backend=cudnn"), CPU, 2)
    kept = Backend("cudnn", torch.float32)
    with pytest.raises(ConfigError, match="continue it where it began, or with allow_changes=true"):
        choose(settings(), CPU, 2, kept)
    assert choose(settings("allow_changes=true"), CPU, 2, kept).backend is None


def test_a_resumed_run_keeps_the_backend(tiny, tmp_path, monkeypatch):
    """It is measured once, and the two halves are bitwise one run."""
    chosen = Backend("math", torch.float32, {"flash": 2.0, "math": 1.0})
    common = [o for o in tiny if not o.startswith("output_dir=")] + ["max_steps=10"]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    monkeypatch.setattr(module, "choose", lambda *_: chosen)
    train(compose([*common, f"output_dir={straight}"]))
    halfway = compose([*common, f"output_dir={stopped}"])
    train(replace(halfway, max_steps=5))
    monkeypatch.undo()
    train(compose([*common, f"output_dir={stopped}", "resume=auto"]))
    for folder in (straight, stopped):
        assert checkpoint.load_newest(folder / "checkpoints").state["attention"] == "math"
        [event] = read_records(folder, "event")
        assert (event["event"], event["backend"], event["seconds"]["math"]) == ("attention", "math", 1.0)
    a, b = ([r["loss"] for r in read_records(d, "train")] for d in (straight, stopped))
    assert a == b
