"""What a run says of torch's compiler."""

from collections import Counter

import pytest
import torch

from train import train
from training.compiler import CompilerWatch, uses_compiler
from training.config import compose
from training.log import read_records

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_programs_are_counted_until_the_watch_is_closed():
    watch = CompilerWatch(active=True)
    assert watch.read() is None  # nothing was compiled since it was opened
    torch.compile(lambda x: x.sin() + 1)(torch.ones(3))
    event = watch.read()
    assert event["event"] == "compiled" and event["programs"] == 1 and 0 <= event["cached"] <= 1
    assert 0 < event["seconds"] < 300 and "compiled 1 program in" in event["message"] and watch.seconds == 0
    assert watch.read() is None
    torch.compile(lambda x: x.cos() + 1)(torch.ones(3))
    watch.close()
    seconds = watch.seconds
    torch.compile(lambda x: x.exp() + 1)(torch.ones(3))
    assert watch.seconds == seconds > 0 and watch.read() is None


def test_programs_from_the_compilers_cache_are_counted_apart(monkeypatch):
    from torch._dynamo.utils import counters

    monkeypatch.setitem(counters, "inductor", Counter(fxgraph_cache_hit=5, fxgraph_cache_miss=5))
    watch = CompilerWatch(active=True)
    counters["inductor"].update(fxgraph_cache_hit=2, fxgraph_cache_miss=1)
    event = watch.read()
    watch.close()
    assert (event["programs"], event["cached"]) == (3, 2)
    assert event["message"] == "compiled 3 programs in 0 s, 2 from the compiler's cache"


def test_a_watch_that_is_not_active_counts_nothing():
    watch = CompilerWatch(active=False)
    torch.compile(lambda x: x.tan() + 1, backend="eager")(torch.ones(3))
    assert watch.read() is None
    watch.close()


@pytest.mark.parametrize(
    ("overrides", "device", "has_muon", "expected"),
    [
        ([], CPU, True, False),
        ([], CUDA, True, True),
        (["compile=true"], CPU, False, True),
        (["compile=false"], CUDA, False, False),
        (["compile=false"], CUDA, True, True),  # the step
        (["compile=false", "optim.muon.rule.compile=false"], CUDA, True, False),
        (["optim.muon.rule.compile=true"], CPU, True, True),
        (["optim.muon.rule.compile=true"], CPU, False, False),
        (["compile=false", "optim=paper"], CUDA, True, False),  # the published step is not compiled
    ],
)
def test_a_run_uses_the_compiler_where_its_settings_say_so(overrides, device, has_muon, expected):
    assert uses_compiler(compose(overrides), device, has_muon) is expected


def test_a_run_records_what_it_compiled_and_says_beforehand_that_it_waits(tiny, tmp_path, capsys):
    common = ["max_steps=4", "schedule.warmup_steps=1", "log.interval=2"]
    train(compose([*tiny, *common, "assignment=adamw", "compile=true", f"output_dir={tmp_path}/compiled"]))
    shown = capsys.readouterr()
    assert "the first steps wait for torch's compiler" in shown.out and "compiled " in shown.err
    [event] = [r for r in read_records(tmp_path / "compiled", "event") if r["event"] == "compiled"]
    assert event["step"] == 2 and event["programs"] >= 2  # a forward and a backward pass
    train(compose([*tiny, *common, f"output_dir={tmp_path}/plain"]))
    assert "compiler" not in capsys.readouterr().out
    assert not list(read_records(tmp_path / "plain", "event"))
