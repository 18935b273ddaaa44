"""The command line: a run ends, resumes bitwise, sweeps, and refuses bad input before it writes anything."""

import json
import re
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import CLOCK, run_train

from data.loader import validation_windows
from optim.manifolds import Stiefel
from scripts.analysis.runs import load_model
from train import train
from training import checkpoint
from training.build import build
from training.checkpoint import CheckpointError
from training.checks import USER_ERRORS, check
from training.config import compose
from training.data import open_data
from training.log import read_records
from training.observer import Observer
from training.optimizers import Optimizers
from training.schedule import lr_multiplier
from training.step import host_tokens
from training.validate import ConfigError

ASSIGNMENTS = ["unconstrained", "all_stiefel", "all_dgram", "hetero", "hetero_inv", "adamw"]


def records(directory, kind=None):
    return [{k: v for k, v in r.items() if k not in CLOCK} for r in read_records(directory, kind)]


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_every_assignment_trains(tiny, tmp_path, assignment):
    best = train(compose([*tiny, f"assignment={assignment}"]))
    evals = records(tmp_path / "run", "eval")
    assert [r["step"] for r in evals] == [0, 5, 10, 15, 20]
    assert best == min(r["loss"] for r in evals) < evals[0]["loss"] - 0.5
    assert {r["name"] for r in records(tmp_path / "run", "spectra")} == {
        f"transformer.h.0.{n}.weight" for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    for r in records(tmp_path / "run", "spectra"):
        assert len(r["sigma"]) == len(r["gram_diagonal"]) == 16 and r["sigma"] == sorted(r["sigma"], reverse=True)
    for name in ("config.yaml", "parameters.txt", "environment.json", "checkpoints/step_00000020"):
        assert (tmp_path / "run" / name).exists()
    [end] = records(tmp_path / "run", "end")
    assert end["best_val_loss"] == best and end["unstable_step"] is None


@pytest.mark.parametrize("optim", ["paper"])
@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.campaign), 0.1])
def test_a_resumed_run_ends_bitwise_like_an_undisturbed_one(tiny, tmp_path, optim, dropout):
    common = [*tiny[:-1], f"optim={optim}", f"model.dropout={dropout}"]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    train(compose([*common, f"output_dir={straight}"]))
    # As if it had been killed at step 13: what came after the checkpoint of step 10 is on disk, and will be done again.
    halfway = compose([*common, f"output_dir={stopped}"])
    train(replace(halfway, max_steps=13, schedule=replace(halfway.schedule, decay_steps=20)))
    later = stopped / "checkpoints" / "step_00000013"
    for file in later.iterdir():
        file.unlink()
    later.rmdir()
    train(compose([*common, f"output_dir={stopped}", "resume=auto"]))
    a, b = (checkpoint.load_newest(d / "checkpoints") for d in (straight, stopped))
    assert a.step == b.step == 20
    assert_equal(a.state["model"], b.state["model"])
    assert_equal(a.state["optimizers"], b.state["optimizers"])
    assert_equal(a.state["rng"], b.state["rng"])
    assert a.state["stability"] == b.state["stability"]
    assert records(straight) == records(stopped)


def assert_equal(a, b):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_equal(x, y)
    else:
        assert a == b


def test_gradient_accumulation_changes_nothing_but_rounding(tiny, tmp_path):
    losses = []
    for micro in (1, 8):
        train(
            compose(
                [
                    *tiny[:-1],
                    f"output_dir={tmp_path}/{micro}",
                    f"micro_batch_size={micro}",
                    "max_steps=3",
                    "assignment=adamw",
                ]
            )
        )
        losses.append([r["loss"] for r in records(tmp_path / str(micro), "train")])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_speed_is_that_of_training_alone(tiny, tmp_path, monkeypatch):
    import train as module

    clock = SimpleNamespace(now=0.0)

    def taking(seconds, work):
        def slow(*args, **kwargs):
            clock.now += seconds
            return work(*args, **kwargs)

        return slow

    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(module, "accumulate", taking(1.0, module.accumulate))
    monkeypatch.setattr(module.Run, "save", taking(30.0, module.Run.save))
    monkeypatch.setattr(Observer, "loss", taking(100.0, Observer.loss))
    for pause in ("write_spectra", "write_probe"):
        monkeypatch.setattr(Observer, pause, taking(30.0, getattr(Observer, pause)))
    train(compose([*tiny, "assignment=adamw", "log.interval=3"]))
    assert [r["tokens_per_s"] for r in read_records(tmp_path / "run", "train")] == [128.0] * 7
    assert next(read_records(tmp_path / "run", "end"))["train_seconds"] == 20.0


def test_steps_that_a_gpu_has_still_to_do_count_as_training(tiny, tmp_path, monkeypatch):
    """A device that needs a second for a step, and a host that waits for it only where it must."""
    import train as module

    clock, queued, waits = SimpleNamespace(now=0.0), [], []

    def waiting(work):
        def waits(*args, **kwargs):
            clock.now += len(queued)
            queued.clear()
            return work(*args, **kwargs)

        return waits

    def launching(*args):
        queued.append("a step")
        return accumulate(*args)

    accumulate = module.accumulate
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(module, "accumulate", launching)
    monkeypatch.setattr(module, "wait_for", waiting(waits.append))
    for owner, name in ((module.Run, "read_back"), (module.Run, "save"), (Observer, "loss"), (Observer, "write_probe")):
        monkeypatch.setattr(owner, name, waiting(getattr(owner, name)))
    intervals = ["log.interval=4", "eval_interval=5", "probe.interval=3", "checkpoint.interval=7"]
    train(compose([*tiny, "assignment=adamw", "log.interval_spectra=null", *intervals]))
    assert [r["tokens_per_s"] for r in read_records(tmp_path / "run", "train")] == [128.0] * 5
    assert len(waits) == len({0, 3, 5, 6, 7, 9, 10, 12, 14, 15, 18, 20})  # the steps at which something is due
    assert next(read_records(tmp_path / "run", "end"))["train_seconds"] == 20.0


def test_a_run_prepares_its_batches_beside_the_training(tiny, monkeypatch):
    import train as module

    threads, given, plain = [], [], module.accumulate

    def preparing(*args):
        threads.append(threading.current_thread().name)
        return host_tokens(*args)

    def computing(model, tokens, *args):
        given.append((tokens.dtype, tuple(tokens.shape)))
        return plain(model, tokens, *args)

    monkeypatch.setattr(module, "host_tokens", preparing)
    monkeypatch.setattr(module, "accumulate", computing)
    train(compose([*tiny, "assignment=adamw", "max_steps=3"]))
    assert given == [(torch.int64, (8, 17))] * 3
    assert len(threads) >= 3 and all(name.startswith("prefetch") for name in threads)


def test_every_interval_is_one_for_which_training_pauses():
    """But that of the training records, which are no pause."""
    names = ["eval_interval", "launcher.checksum_interval", "log.interval_spectra", "log.interval_certificate"]
    names += ["log.interval_updates", "probe.interval", "checkpoint.interval"]
    cfg = compose([f"{name}={i}" for i, name in enumerate(names, start=2)])
    assert sorted(cfg.intervals()) == list(range(2, 2 + len(names)))
    assert str(cfg.plain()).count("interval") == len(names) + 1


def test_the_whole_validation_split_is_evaluated_once_at_the_end(tiny, tmp_path):
    for full in ("true", "false"):
        where = f"output_dir={tmp_path}/{full}"
        train(compose([*tiny[:-1], "assignment=adamw", "max_steps=6", "eval_interval=3", f"full_eval={full}", where]))
    [record], [end] = records(tmp_path / "true", "full_eval"), records(tmp_path / "true", "end")
    model, cfg, _ = load_model(tmp_path / "true")
    windows = torch.from_numpy(validation_windows(open_data(cfg).val, 16).astype("int64"))
    assert len(windows) == open_data(cfg).val.tokens // 17 > cfg.eval_windows
    with torch.no_grad():
        losses = torch.stack([model(w[None, :-1], w[None, 1:])[1] for w in windows])
    assert record["step"] == 6 and record["tokens"] == 16 * len(windows)
    assert record["loss"] == pytest.approx(losses.mean().item(), abs=1e-5)
    assert record["loss"] != records(tmp_path / "true", "eval")[-1]["loss"]
    # Nothing else knows of it: not the best loss, not training.
    [plain] = records(tmp_path / "false", "end")
    assert plain == end
    assert [r for r in records(tmp_path / "true") if r["kind"] not in ("end", "full_eval")] == [
        r for r in records(tmp_path / "false") if r["kind"] != "end"
    ]


@pytest.mark.parametrize("experiment", ["paper", "one_gpu", "ngpt_124m", "instability_one_gpu"])
def test_the_published_scale_evaluates_as_much_as_the_published_code(experiment):
    assert compose([f"experiment={experiment}"]).eval_windows == 200 * 64


@pytest.mark.parametrize(("max_skipped", "steps"), [("null", 20), ("0", 7)])
def test_a_run_that_turns_non_finite_is_a_result(tiny, tmp_path, monkeypatch, max_skipped, steps):
    """It goes on to its last step, or to the record that says that more updates were skipped than allowed."""
    import train as module

    plain, calls = module.accumulate, []

    def poisoned(model, *args):
        loss = plain(model, *args)
        calls.append(loss)
        if len(calls) == 7:
            next(model.parameters()).grad[0, 0] = torch.nan
        return loss

    monkeypatch.setattr(module, "accumulate", poisoned)
    best = train(compose([*tiny, f"stability.max_skipped={max_skipped}"]))
    [end] = records(tmp_path / "run", "end")
    assert end["step"] == steps and end["unstable_step"] == 7 and "not finite" in end["reason"] and best < 6
    skipped = [r["skipped_updates"] for r in records(tmp_path / "run", "train")]
    assert skipped == [0] * 6 + [1] * (steps - 6)
    assert all(p.isfinite().all() for p in checkpoint.load_newest(tmp_path / "run/checkpoints").state["model"].values())


def test_training_records_count_the_steps_that_took_the_fallback(tiny, tmp_path):
    """At this rate, columns of DGram come near length zero. Of a matrix in one block, its certificate has the same count."""
    train(compose([*tiny, "assignment=all_dgram", "optim.muon.lr=0.3", "log.interval_certificate=1"]))
    counted = [r["fallbacks"] for r in records(tmp_path / "run", "train")]
    last = {r["name"]: r["fallbacks"] for r in records(tmp_path / "run", "certificate")}
    assert counted == sorted(counted) and counted[-1] == sum(last.values()) > counted[0]
    optimizers = build(compose([*tiny, "assignment=all_dgram"]), torch.device("cpu"))[1]
    optimizers.muon.buckets[-1].state["fallbacks"][0] = 3
    assert optimizers.fallbacks(lambda here: here + 4) == 7  # as if another rank had 4
    train(compose([*tiny, "assignment=adamw", f"output_dir={tmp_path}/adamw"]))
    assert {r["fallbacks"] for r in records(tmp_path / "adamw", "train")} == {None}


BAD = [
    (
        ["global_batch_tokens=100"],
        "global_batch_tokens=100 is not a multiple of block_size 16; use global_batch_tokens=96 or 112",
    ),
    (["model.n_head=3"], "model.n_embd=16 is not divisible by model.n_head=3"),
    (["assignment=custom", "assignment.rules={attn: stiefel}"], "no rule matches 'transformer.h.0"),
    (["assignment=custom", "assignment.rules={attn: steifel, mlp: dgram}"], "choose one of euclidean, stiefel"),
    (["seed=-1", "device=gpu"], "device is 'gpu'"),
    (["schedule.kind=cosin"], "schedule.kind is 'cosin'"),
    (["model.vocab_size=100"], "smaller than the data's vocabulary"),
    (["model.block_size=100000", "global_batch_tokens=400000"], "longer than the data"),
    (["data.dir=/nowhere"], "python -m data.prepare data=text"),
    (["~experiment"], "schedule.warmup_steps is missing"),
]


@pytest.mark.parametrize(("overrides", "message"), BAD, ids=[b[0][-1][:30] for b in BAD])
def test_bad_input_is_refused_before_anything_is_written(tiny, tmp_path, overrides, message):
    replaced = {o.split("=")[0] for o in overrides}
    if "~experiment" in replaced:
        replaced.add("schedule.warmup_steps")
    kept = [o for o in tiny if o.split("=")[0] not in replaced]
    with pytest.raises(USER_ERRORS) as caught:
        train(compose([*kept, *overrides]))
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_every_problem_is_listed_at_once(tiny):
    with pytest.raises(ConfigError) as caught:
        check(compose([*tiny, "seed=-1", "device=gpu", "model.n_head=3", "eval_windows=0"]))
    assert len(caught.value.problems) == 4


def test_a_checkpoint_of_another_model_is_refused(tiny, tmp_path):
    train(compose([*tiny, "max_steps=5"]))
    before = sorted(p.name for p in (tmp_path / "run").rglob("*"))
    with pytest.raises(CheckpointError, match=r"(?s)or add allow_changes=true to go on .*model.n_embd: 16 → 32"):
        train(compose([*tiny, "max_steps=5", "model.n_embd=32", "resume=auto"]))
    assert sorted(p.name for p in (tmp_path / "run").rglob("*")) == before
    with pytest.raises(ConfigError, match="already holds a run"):
        train(compose([*tiny, "max_steps=5"]))


def test_command_line(tiny, tmp_path, train_here):
    done = run_train(*tiny, "max_steps=5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    best = min(r["loss"] for r in read_records(tmp_path / "run", "eval"))
    assert done.stdout.splitlines()[-1] == f"best validation loss {best:.4f}"
    assert "ManifoldMuon" in done.stdout
    assert re.search(
        r" parameters → .*\nCPU .*, \d+ threads?, float32, attention by the choice of torch\n", done.stdout
    )
    assert json.loads((tmp_path / "run/environment.json").read_text())["torch"] == str(torch.__version__)
    left = {p.name for p in tmp_path.iterdir()}
    bad = train_here(*tiny[:-1], f"output_dir={tmp_path}/bad", "global_batch_tokens=100", "seed=-1")
    assert bad.returncode == 2 and "2 problems" in bad.stderr and "Traceback" not in bad.stderr
    assert {p.name for p in tmp_path.iterdir()} == left
    unknown = train_here("max_stepz=3")
    assert unknown.returncode == 2 and "max_stepz" in unknown.stderr
    assert {p.name for p in tmp_path.iterdir()} == left


def test_sweep_has_one_directory_a_job(tiny, tmp_path, train_here):
    sweep = train_here("-m", *tiny[:-1], "max_steps=3", "assignment=adamw,all_stiefel", "seed=1,2")
    assert sweep.returncode == 0, sweep.stderr
    assert sweep.stdout.count("best validation loss") == 4
    runs = [p.parent for p in (tmp_path / "outputs").rglob("metrics.jsonl")]
    assert len(runs) == 4 and all(tmp_path / "outputs" / "sweep" == r.parent for r in runs)
    [constant] = {r.name.rpartition(",")[2] for r in runs}  # a hash of the words that all jobs share
    jobs = [f"assignment={name},seed={seed}" for name in ("adamw", "all_stiefel") for seed in (1, 2)]
    assert {r.name for r in runs} == {f"{job},{constant}" for job in jobs}
    for number, job in enumerate(jobs, start=1):
        assert f"job {number}/4: {job},{constant}\n" in sweep.stdout
        name, seed = job.removeprefix("assignment=").split(",seed=")
        assert f"{name}, job {number}/4, seed {seed}" in sweep.stderr


def test_matrices_off_their_manifold_and_steps_uphill_are_reported(tiny, tmp_path, monkeypatch, capsys):
    train(compose([*tiny[:-1], "assignment=all_stiefel", "max_steps=2", f"output_dir={tmp_path / 'sound'}"]))
    assert not records(tmp_path / "sound", "event")
    monkeypatch.setattr(Stiefel, "_retract", lambda self, W, polar: 1.5 * polar(W))  # WᵀW = 2.25·I
    seen = [("h.0.attn", {"feas": 0.0}), ("h.0.mlp", {"feas": -0.1})]
    monkeypatch.setattr(Optimizers, "certificates", lambda self, gather: seen)
    train(compose([*tiny, "assignment=all_stiefel", "max_steps=2"]))
    events = {r["event"]: r["message"] for r in records(tmp_path / "run", "event")}
    assert events["off_manifold"].startswith("4 matrices are off their manifold; the worst is transformer.h.0.")
    assert re.search(r"by 0\.5\d of ‖WᵀW‖_F$", events["off_manifold"])
    assert events["uphill"] == "steps went uphill: of 1 matrices, such as h.0.mlp"
    shown = capsys.readouterr()
    assert (shown.out + shown.err).count("off their manifold") == 1  # of each type, a run shows the first


def test_spectra_are_recorded_under_their_step_once_they_are_known():
    written = []
    log = SimpleNamespace(write=lambda kind, step, **fields: written.append((kind, step, fields)))
    found = {"a": {"distance": 0.04}, "b": {"distance": 0.06}, "c": {"distance": 0.2}, "d": {}}
    spectra = SimpleNamespace(done=False, records=lambda: list(found.items()))
    observer = SimpleNamespace(begun_spectra=(3, spectra))
    Observer.finish_spectra(observer, log, wait=False)
    assert not written
    spectra.done = True
    for wait in (False, True):
        Observer.finish_spectra(observer, log, wait=wait)
        assert len(written) == 5
    assert [(kind, step) for kind, step, _ in written] == [*[("spectra", 3)] * 4, ("event", 3)]
    assert written[-1][2]["message"] == "2 matrices are off their manifold; the worst is c, by 0.2 of ‖WᵀW‖_F"


def test_a_run_without_matrices_for_manifold_muon_says_so(tiny, capsys):
    train(compose([*tiny, "assignment=adamw", "max_steps=1"]))
    assert "ManifoldMuon has no matrix: optim.muon is not used" in capsys.readouterr().out


def test_the_rates_of_a_record_are_those_of_its_step(tiny, tmp_path):
    cfg = compose([*tiny, "max_steps=4", "assignment=all_stiefel"])
    train(cfg)
    for record in read_records(tmp_path / "run", "train"):
        now = lr_multiplier(record["step"] - 1, **vars(cfg.schedule))
        assert record["lr"] == pytest.approx(
            {"ManifoldMuon": cfg.optim.muon.lr * now, "AdamW": cfg.optim.adamw.lr * now}
        )
