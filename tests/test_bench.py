"""The benchmarks: each measures what it says and writes what it prints."""

import json
import math
import os
import signal

import numpy as np
import pytest
import torch

from scripts import bench, bench_ceilings, bench_predicted, bench_residual, bench_train, gpu_check, timing
from scripts.bench_train import RandomTraining, trainings_by_assignment
from scripts.command import UsageError
from training.config import compose


def every_residual_rule_is_measured(rows):
    rules = {row["rule"]: row for row in rows}
    assert set(rules) == set(bench_residual.residual_settings())
    assert rules["pre_norm"]["time ratio"] == rules["pre_norm"]["memory ratio"] == 1.0
    assert rules["sandwich_norm"]["memory ratio"] > 1.0


POSITIVE = {  # a number above zero in every row
    "residual": "fastest s",
    "probes": "probe s",
    "train": "optimizer s",
    "ceilings": "median s",
    "predicted": "tokens/s, predicted",
    "profile": "ms a step",
    "scaling": "step ms, predicted",
    "memory": "held",
}


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("residual", ["layers=1", "micro_batch_size=1", "repeats=1"], ["geonorm", "nGPT", "time ratio"]),
        (
            "probes",
            ["model=demo", "tokens=256", "micro_batch_size=1", "repeats=1"],
            ["share of training", "their share"],
        ),
        ("train", ["model=demo", "tokens=256", "assignments=hetero", "repeats=1"], ["hetero", "optimizer share"]),
        ("ceilings", ["repeats=1"], ["copy, bytes read and written", "svdvals", "cudnn, forward"]),
        ("predicted", [], ["hetero_inv", "tokens/s, predicted", "measured in"]),
        (
            "profile",
            ["model=demo", "tokens=256", "micro_batch_size=1", "assignments=adamw"],
            ["aten::mm", "calls a step"],
        ),
        ("scaling", [], ["gpt2_774m", "1024", "received MiB a rank", "exchange ms, predicted"]),
        ("memory", [], ["gpt2_1_5b", "fsdp", "not measured"]),
    ],
)
def test_bench_writes_what_it_prints(name, options, told, tmp_path, monkeypatch, capsys):
    small = {"width": 16, "heads": 2, "block": 8, "vocab": 32, "tokens": 16}
    monkeypatch.setattr(bench_predicted, "fused", lambda *group: (1, 10**8))  # torch.compile takes a minute for all
    monkeypatch.setattr(bench_predicted, "step_flops", lambda *step: 10**11)
    monkeypatch.setitem(bench_residual.RESIDUAL_SIZES, "cpu", bench_residual.RESIDUAL_SIZES["cpu"] | small)
    assert bench.main([name, *options, f"results={tmp_path}"]) == 0
    table, data = (tmp_path / f"bench_{name}.md").read_text(), json.loads((tmp_path / f"bench_{name}.json").read_text())
    printed = capsys.readouterr().out
    assert all(word in table and word in printed for word in told)
    rows = data["rows"]
    assert rows and not rows[0].get("note")
    assert all(row[POSITIVE[name]] > 0 for row in rows if not row.get("note"))  # a note says why it cannot be measured
    assert all(math.isfinite(x) for row in rows for x in row.values() if isinstance(x, float))
    if name == "residual":
        every_residual_rule_is_measured(rows)
    assert data["command"].startswith(f"python scripts/bench.py {name}") and data["device"] in table


def test_a_bench_that_had_too_little_time_says_so(tmp_path, monkeypatch):
    """By its exit code, so that gpu_check runs it again; what it has is written. Without a limit, no time was too short."""
    rows = [{"step": "one", "median s": 1.0}, {"step": "two", "median s": "not measured"}]
    monkeypatch.setitem(bench.BENCHES, "optimizer", lambda options: rows)
    assert bench.main(["optimizer", "limit_s=1", f"results={tmp_path}"]) == 1
    assert json.loads((tmp_path / "bench_optimizer.json").read_text())["rows"] == rows
    assert bench.main(["optimizer", f"results={tmp_path}"]) == 0
    monkeypatch.setitem(bench.BENCHES, "optimizer", lambda options: rows[:1])
    assert bench.main(["optimizer", "limit_s=1", f"results={tmp_path}"]) == 0


def test_a_bench_that_is_stopped_writes_what_it_has(tmp_path, monkeypatch, capsys):
    """A signal that comes while the second is compiled: the first is timed once. Before anything is measured, nothing is written."""

    before = signal.getsignal(signal.SIGTERM)

    def rows(options):
        times = timing.take_turns({"one": lambda: None, "two": stop}, repeats=3)
        return [{"step": name, "median s": timing.median(seconds)} for name, seconds in times.items()]

    monkeypatch.setitem(bench.BENCHES, "optimizer", rows)
    assert bench.main(["optimizer", f"results={tmp_path}"]) == 1 and signal.getsignal(signal.SIGTERM) == before
    one, two = json.loads((tmp_path / "bench_optimizer.json").read_text())["rows"]
    assert one["median s"] >= 0 and two["median s"] == "not measured"
    monkeypatch.setattr(bench_ceilings, "ceiling_row", stop)
    assert bench.main(["ceilings", f"results={tmp_path}"]) == 143
    assert "before anything was measured" in capsys.readouterr().err and not (tmp_path / "bench_ceilings.md").exists()


def stop(*_):
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("name", "module", "memory", "time", "words"),
    [
        ("train", bench_train, "peak_bytes", "tokens/s", ["model=demo", "tokens=256", "assignments=adamw,hetero"]),
        ("residual", bench_residual, "kept_bytes", "time ratio", []),
    ],
)
def test_a_signal_while_memory_is_measured_costs_no_time(name, module, memory, time, words, tmp_path, monkeypatch):
    monkeypatch.setattr(module, memory, stop)
    small = {"layers": 1, "width": 16, "heads": 2, "block": 8, "vocab": 32, "tokens": 16}
    monkeypatch.setitem(bench_residual.RESIDUAL_SIZES, "cpu", bench_residual.RESIDUAL_SIZES["cpu"] | small)
    shared = ["micro_batch_size=1", "repeats=1", f"results={tmp_path}"]
    assert bench.main([name, *words, *shared]) == 1
    rows = json.loads((tmp_path / f"bench_{name}.json").read_text())["rows"]
    assert len(rows) > 1 and all(row[time] > 0 for row in rows)


@pytest.mark.parametrize("fails", [1, 2, 4])
def test_what_fails_is_left_out_and_the_others_are_measured(fails, tmp_path, monkeypatch, capsys):
    """hetero fails while it is compiled, in a turn, or when its memory is measured. The exit code says so."""
    calls, step = [], RandomTraining.step

    def failing(training):
        if training.optimizers.muon:
            calls.append(1)
            if len(calls) == fails:
                raise RuntimeError("no kernel")
        step(training)

    monkeypatch.setattr(RandomTraining, "step", failing)
    monkeypatch.setattr(bench_train, "WARM_UP", 0)
    small = ["model=demo", "tokens=256", "micro_batch_size=1", "repeats=2"]
    assert bench.main(["train", *small, "assignments=adamw,hetero", f"results={tmp_path}"]) == 1
    data = json.loads((tmp_path / "bench_train.json").read_text())
    adamw, hetero = data["rows"]
    assert adamw["peak GiB"] != "not measured" and len(adamw["all s"]) == 2
    assert hetero["peak GiB"] == "not measured" and len(hetero["all s"]) == {1: 0, 2: 0, 4: 2}[fails]
    assert len(data["failed"]) == 1 and "hetero" in data["failed"][0] and "no kernel" in capsys.readouterr().err


def test_a_profile_of_which_all_fails_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_train, "traced", lambda *_: 1 // 0)
    assert bench.main(["profile", "model=demo", "tokens=256", "micro_batch_size=1", f"results={tmp_path}"]) == 1
    assert "failed, see above" in capsys.readouterr().out and not any(tmp_path.iterdir())


def test_a_rule_whose_memory_cannot_be_measured_keeps_its_time(monkeypatch):
    sizes = {"layers": 1, "width": 16, "heads": 2, "block": 8, "vocab": 32, "micro": 1, "tokens": 16}
    options = {"layers": 0, "width": 0, "micro_batch_size": 0, "repeats": 1, "limit_s": 0}
    rules = {name: bench_residual.residual_settings()[name] for name in ("pre_norm", "geonorm")}
    monkeypatch.setattr(bench_residual, "residual_settings", lambda: rules)
    kept = iter([100, None])
    monkeypatch.setattr(bench_residual, "kept_bytes", lambda *_: next(kept) or 1 // 0)
    monkeypatch.setattr(timing, "failures", [])
    base, rule = bench_residual.residual_rows(options, sizes)
    assert base["memory ratio"] == 1 and rule["memory ratio"] == "not measured" and rule["time ratio"] > 0
    assert timing.failures == ["geonorm"]


def test_shares_of_a_probe_are_those_of_what_was_measured(monkeypatch):
    """A probe that fails costs only its own columns; the decomposition is not timed beside another call."""
    options = {"model": "demo", "tokens": 256, "micro_batch_size": 1, "repeats": 2}
    monkeypatch.setattr(bench_train, "probe", lambda *_: 1 // 0)
    monkeypatch.setattr(timing, "failures", [])
    [row] = bench_train.probe_rows(options)
    assert row["probe s"] == row["share of training"] == "not measured" and timing.failures == ["probe"]
    assert row["spectra s"] == row["waited for s"] > 0 and row["their share"].endswith("%")


def test_steps_that_are_timed_together_wait_once(monkeypatch):
    waits, made = [], []
    monkeypatch.setattr(timing, "wait_for", waits.append)
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def step():
        made.append(1)
        now[0] += 2

    assert timing.take_turns({"": step}, repeats=3, warmup=2, together=4) == {"": [2, 2, 2]}
    assert len(made) == 2 + 3 * 4 and len(waits) == 2 * (2 + 3)


def test_a_timed_step_waits_only_at_its_end(monkeypatch):
    """As in training, where the host runs ahead of the device; the update alone is timed beside."""
    training = RandomTraining(compose(["model=demo", "model.n_layer=1", "assignment=hetero"]), micro=1, tokens=256)
    waits = []
    monkeypatch.setattr(timing, "wait_for", waits.append)
    training.step()
    assert not waits
    times = timing.take_turns({"": training.step}, repeats=3)[""]
    updates = training.update_seconds()
    assert len(updates) == 5 and len(waits) == 8
    assert all(0 < update < whole for update, whole in zip(updates[-3:], times))


def test_a_timed_step_has_all_parts_of_a_step():
    words = ["model=demo", "model.n_layer=1", "assignment=hetero", "average=ema", "grad_clip=null"]
    training = RandomTraining(compose(words), micro=1, tokens=256)
    training.step()
    assert training.average.counts[0] == 1 and len(training.tensors()) > 2 * len(list(training.model.parameters()))
    with pytest.raises(UsageError, match="documents"):
        trainings_by_assignment(
            {
                "variants": "batches.documents=true",
                "optims": "paper",
                "assignments": "adamw",
                "model": "demo",
                "micro_batch_size": 1,
                "tokens": 256,
            }
        )


def test_gpu_check_gives_each_benchmark_options_that_it_takes():
    """The words of its steps on a GPU and with tiny=true; and no benchmark is without an entry."""
    assert set(bench.OPTIONS_OF) == set(bench.BENCHES)
    for words in ([], ["tiny=true"]):
        options = gpu_check.options_of(words)[1]
        steps = [step.within(200) for stage in "ab" for step in gpu_check.steps_of(stage, options)]
        benches = [command[2:] for command in steps if "scripts/bench.py" in command]
        assert len(benches) == 8 and all(bench.options_of(words)[0] == words[0] for words in benches)


def test_a_table_that_cannot_be_written_is_one_message(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(bench.BENCHES, "counts", lambda options: [{"step": "one"}])
    monkeypatch.setattr(bench, "write_tables", full)
    assert bench.main(["counts", f"results={tmp_path}"]) == 2
    out, err = capsys.readouterr()
    assert "one" in out and f"{tmp_path} cannot be written" in err and "give another results=" in err


def test_a_profile_is_of_as_many_steps_as_asked(monkeypatch):
    monkeypatch.setattr(bench_train, "trainings_by_assignment", lambda options: {("adamw", "-", "-"): None})
    monkeypatch.setattr(bench_train, "traced", lambda training, names, folder, steps: [{**names, "steps": steps}])
    [asked], [plain] = (bench_train.profile_rows({"repeats": n, "traces": ""}) for n in (5, 0))
    assert (asked["steps"], plain["steps"]) == (5, 2)


def test_bench_names_its_benchmarks(capsys):
    assert bench.main([]) == bench.main(["speed"]) == 2
    assert (
        "name one benchmark: ceilings, optimizer, lmo, train, profile, residual, probes, scaling, memory"
        in capsys.readouterr().err
    )


def test_bench_lmo_measures_the_step_and_every_method(tmp_path, capsys):
    torch.manual_seed(0)
    W = torch.linalg.qr(torch.randn(12, 6))[0]
    np.savez(
        tmp_path / "p.npz", **{"stiefel_x/W": W.numpy(), "stiefel_x/G": torch.randn(12, 6), "stiefel_x/optimum": 1}
    )
    assert bench.main(["lmo", f"problems={tmp_path}/p.npz", f"results={tmp_path}"]) == 0
    rows = json.loads((tmp_path / "bench_lmo.json").read_text())["rows"]
    assert {"step, default, float32", "step, high, float16", "su", "dual_ascent"} <= {row["solver"] for row in rows}
    assert all(0.5 < row["certified feas"] < 1.01 for row in rows if row["solver"].startswith("step"))
    assert bench.main(["lmo", "problems=none.npz"]) == 2 and "no problems in none.npz" in capsys.readouterr().err


def test_predictions_are_judged_by_measurements(tmp_path, monkeypatch):
    """Those of one device of the predictions' class, which has AdamW; of the certified step and without further settings."""
    monkeypatch.setattr(bench_predicted, "ROOT", tmp_path)
    monkeypatch.setattr(bench_predicted, "step_seconds", lambda *group: (1e-4, 1e-4))
    row = {"model": "gpt2_124m", "optim": "manifold_muon", "variant": "-", "assignment": "hetero", "tokens/s": 4.0e5}
    others = [row | {"variant": "capture=true", "tokens/s": 1.0}, row | {"optim": "paper", "tokens/s": 2.0}]
    adamw = row | {"assignment": "adamw", "optim": "-", "tokens/s": 5.0e5}
    devices = {
        "nvidia-h100-80gb-hbm3": [row, *others, adamw],
        "nvidia-h200": [row | {"tokens/s": 6.0e5}],  # without AdamW: no share of it
        "nvidia-a100": [row | {"tokens/s": 3.0}, adamw],
    }
    for device, rows in devices.items():
        (tmp_path / "results" / device).mkdir(parents=True)
        (tmp_path / "results" / device / "bench_train.json").write_text(json.dumps({"rows": rows}))
    assert bench_predicted.measurements() == ("nvidia-h100-80gb-hbm3", {"hetero": 4.0e5, "adamw": 5.0e5})
    table = {row["assignment"]: row for row in bench_predicted.predicted_rows()}
    assert table["hetero"]["share of AdamW's, measured"] == 0.8
    assert table["hetero"]["measured in"] == "nvidia-h100-80gb-hbm3" and table["all_dgram"]["measured in"] == "-"
    counted = {name: bench_predicted.groups_of(name).total() for name in ("adamw", *bench_predicted.ASSIGNMENTS)}
    assert counted == {name: 0 if name == "adamw" else 48 for name in counted}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU records the update")
def test_an_update_that_cannot_be_captured_is_refused_before_anything_is_measured(capsys, tmp_path):
    assert bench.main(["train", "variants=capture=true", f"results={tmp_path}"]) == 2
    assert "the device is a CPU; use capture=false" in capsys.readouterr().err
