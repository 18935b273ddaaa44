"""Going on: what fits is taken by name, what does not is named, and nothing that was written is lost."""

import json
import math
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from test_train import assert_equal, records

import train as module
from scripts import export, sample
from scripts.analysis.runs import read_run
from train import train
from training import checkpoint
from training.build import build
from training.checkpoint import CheckpointError, Loaded, load_newest
from training.checks import USER_ERRORS
from training.config import compose
from training.job import plan_job
from training.log import METRICS_FILE, read_records
from training.ranks import Ranks
from training.resume import changes_of, differences, find_checkpoint, restore, take_weights
from training.stability import Stability
from training.step import FiniteGuard
from training.validate import ConfigError

RESUMED = ["allow_changes=true", "resume=auto", "max_steps=12"]


def state_of(directory):
    return load_newest(directory / "checkpoints").state


def files(directory):
    return {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()}


# ---- records without checkpoints ----


@pytest.mark.parametrize("ended", [True, False])
def test_records_whose_checkpoints_are_gone_are_not_erased(copied, ended):
    run, overrides = copied
    shutil.rmtree(run / "checkpoints")
    if not ended:
        lines = (run / METRICS_FILE).read_bytes().splitlines(keepends=True)
        (run / METRICS_FILE).write_bytes(b"".join(line for line in lines if b'"kind": "end"' not in line))
    before = files(run)
    with pytest.raises(CheckpointError, match=r"records of a run up to step 10, but no checkpoint") as caught:
        train(compose([*overrides, "resume=auto", "max_steps=12"]))
    assert isinstance(caught.value, USER_ERRORS) and "choose another output_dir" in str(caught.value)
    assert files(run) == before
    (run / "config.yaml").unlink()  # the interval of the command, 5 steps, then says where a checkpoint was
    with pytest.raises(CheckpointError, match=r"up to step 10, but no checkpoint"):
        find_checkpoint(compose([*overrides, "resume=auto", "max_steps=12"]), run, "")


def test_a_run_stopped_before_its_first_checkpoint_starts_anew_and_keeps_what_it_wrote(copied, caplog):
    run, overrides = copied
    shutil.rmtree(run / "checkpoints")
    written = (run / METRICS_FILE).read_bytes()
    early = b"".join(line for line in written.splitlines(keepends=True) if json.loads(line)["step"] <= 5)
    (run / METRICS_FILE).write_bytes(early)
    train(compose([*overrides, "resume=auto"]))
    assert (run / f"{METRICS_FILE}.1.old").read_bytes() == early and "records of an earlier start" in caplog.text
    assert records(run)[-1]["kind"] == "end"


def test_a_run_without_checkpoints_may_get_some_later(copied):
    """Its records may be of any step: it was killed before its end, which alone saves."""
    run, overrides = copied
    shutil.rmtree(run / "checkpoints")
    lines = (run / METRICS_FILE).read_text().splitlines(True)
    (run / METRICS_FILE).write_text("".join(line for line in lines if json.loads(line)["step"] < 10))
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["checkpoint"]["interval"] = None
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    train(compose([*overrides, "resume=auto", "checkpoint.interval=2"]))
    assert state_of(run)["step"] == 10


def test_another_runs_directory_is_not_written_into(copied, tmp_path):
    run, overrides = copied
    shutil.copytree(run, tmp_path / "other")
    before = files(tmp_path / "other")
    there = [*overrides[:-1], f"output_dir={tmp_path}/other", f"resume={run}/checkpoints/step_00000005"]
    with pytest.raises(CheckpointError, match=r"already holds the records of another run"):
        train(compose(there))
    assert files(tmp_path / "other") == before
    train(compose([*there[:-2], f"output_dir={tmp_path}/new", there[-1]]))
    assert state_of(tmp_path / "new")["step"] == 10
    train(compose([*overrides, there[-1]]))  # an older checkpoint of its own


def test_a_damaged_record_does_not_keep_a_run_from_going_on(copied, base, caplog):
    run, overrides = copied
    lines = (run / METRICS_FILE).read_bytes().splitlines(keepends=True)
    cut = [line for line in lines if json.loads(line)["step"] <= 5]
    (run / METRICS_FILE).write_bytes(b"".join([cut[0], b"\0\0damage\n", *cut[1:]]))
    shutil.rmtree(run / "checkpoints" / "step_00000010")
    train(compose([*overrides, "resume=auto"]))
    assert (run / f"{METRICS_FILE}.damaged").read_bytes() == b"\0\0damage\n" and "line 2 is not a record" in caplog.text
    assert records(run) == records(base[0])


# ---- settings that changed ----

# Overrides; what must be said, by patterns; and what must not be.
CHANGES = {
    "to AdamW": (
        ["assignment=adamw"],
        [r"AdamW's state of transformer\.h\.0-1\.attn\.c_attn\.weight: starts from scratch"],
    ),
    "another manifold": (["assignment=all_dgram"], [r"h\.0-1\.attn\.c_proj\.weight: brought onto its manifold"]),
    "another step rule": (["optim=manifold_muon"], [r"changed: optim\.muon\.rule\.kind: published → certified"]),
    "residual rule": (
        ["residual=geonorm"],
        [r"ln_1\.angle\.scale: starts from scratch", r"transformer\.ln_f\.weight: in the ch"],
    ),
    "untied": (["model.tied=false"], [r"AdamW's state of lm_head\.weight: starts from scratch"]),
    "context": (
        ["model.block_size=32", "micro_batch_size=2"],
        [
            r"wpe\.weight: starts from scratch \(16 x 16, 32 x 16 here\)",
            r"AdamW's exp_avg, exp_avg_sq of transformer\.wpe",
        ],
    ),
    "rotary": (["model.rope=true"], [r"transformer\.wpe\.weight: in the checkpoint, but not in this model"]),
    "qk_norm": (["attention=qk_norm"], [r"h\.0-1\.attn\.q_norm\.weight: starts from scratch \(not there, 8 here\)"]),
    "gates": (["attention=gated"], [r"head_gate\.weight: starts from scratch"]),
    "bfloat16": (["dtype=bfloat16"], []),
    "layers": (["model.n_layer=3"], [r"transformer\.h\.2\.mlp\.c_fc\.weight: starts from scratch"]),
    "blocks": (
        ["optim.muon.blocks={c_attn: 6}"],
        [r"ManifoldMuon's momentum, level, fallbacks of transformer\.h\.0-1\.attn\.c_attn"],
    ),
    "biases": (["model.bias=true"], [r"transformer\.h\.0-1\.mlp\.c_fc\.bias: starts from scratch"]),
    "no warning": (["stability.warning=null"], []),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_take_what_fits_and_name_the_rest(copied, capsys, change):
    run, overrides = copied
    before, (changed, said) = state_of(run), CHANGES[change]
    train(compose([*overrides, *RESUMED, *changed]))
    out = capsys.readouterr().out
    told = [line for line in out[out.index("resumed from") :].splitlines() if line.startswith("  - ")]
    for pattern in said:
        assert any(re.search(pattern, line) for line in told), (pattern, told)
    if not said:
        assert all(line.startswith("  - changed: ") for line in told)
    after = state_of(run)
    assert after["seconds"] > before["seconds"] > 0
    assert after["step"] == 12 and [r["step"] for r in read_records(run, "train")] == list(range(1, 13))
    assert not set(after["model"]) - set(before["model"]) or any("starts from scratch" in line for line in told)


def restored(directory, overrides, *changes):
    """Model and optimizers right after a checkpoint was put in place; and what was said."""
    cfg = compose([*overrides, "resume=auto", "allow_changes=true", *changes])
    model, optimizers = build(cfg)
    guard = FiniteGuard([name for name, _ in model.named_parameters()], torch.device("cpu"))
    loaded = load_newest(directory / "checkpoints")
    notes = restore(loaded, cfg, model, optimizers, Stability(cfg.stability), guard)
    return model, optimizers, loaded.state, notes


def test_other_settings_are_recorded_and_equal_ones_are_not(copied):
    run, overrides = copied
    for words in (["max_steps=12"], ["max_steps=14", "optim.muon.lr=0.01"], ["max_steps=14", "optim.muon.lr=0.01"]):
        train(compose([*overrides, "resume=auto", "allow_changes=true", "schedule.decay_steps=20", *words]))
    recorded = read_run(run)
    assert recorded.changes == {12: ("optim.muon.lr: 0.05 → 0.01",)} and recorded.status == "ok, changed at step 12"


def state_by_name(optimizer):
    return {n: optimizer.state[p] for g in optimizer.param_groups for n, p in zip(g["names"], g["params"])}


def test_the_configurations_settings_win_over_the_checkpoints(copied):
    changes = [
        "optim.adamw.weight_decay=0.37",
        "optim.adamw.betas=[0.5,0.6]",
        "optim.adamw.eps=1e-3",
        "optim.muon.momentum=0.1",
    ]
    _, optimizers, state, notes = restored(*copied, *changes)
    muon, adamw = optimizers
    assert [g["weight_decay"] for g in adamw.param_groups] == [0.37, 0.0]
    assert all(tuple(g["betas"]) == (0.5, 0.6) and g["eps"] == 1e-3 for g in adamw.param_groups)
    assert all(g["momentum"] == 0.1 for g in muon.param_groups)
    assert all(value["step"] == 10 for value in state_by_name(adamw).values()) and notes == []
    assert "optim.adamw.betas: [0.9, 0.95] → [0.5, 0.6]" in changes_of(state["config"], compose([*copied[1], *changes]))


def test_state_is_found_by_name_when_the_order_is_another(copied):
    """Untied, the head stands between others; with a rate of its own, an attention matrix goes to the end of another group."""
    plain, before = restored(*copied)[1], {}
    for optimizer in plain:
        before |= state_by_name(optimizer)
    _, optimizers, _, notes = restored(*copied, "model.tied=false", "optim.muon.lr_scale={h.0.attn.c_attn: 0.5}")
    after = {}
    for optimizer in optimizers:
        after |= state_by_name(optimizer)
    assert set(after) - set(before) == {"lm_head.weight"} and not after["lm_head.weight"]
    for name, value in before.items():
        assert_equal(dict(value), dict(after[name]))
    assert [n for n in notes if not n.startswith("changed")] == ["AdamW's state of lm_head.weight: starts from scratch"]


def test_weights_come_onto_a_manifold_that_is_new_to_them(copied):
    run, overrides = copied
    model, _, state, _ = restored(run, overrides, "assignment=hetero_inv")  # attention dgram, MLP Stiefel
    W = model.transformer.h[0].mlp.c_fc.weight.detach()  # (64, 16), tall
    assert torch.allclose(W.T @ W, torch.eye(16), atol=1e-2)
    saved = state["model"]["transformer.h.0.mlp.c_fc.weight"]
    U, _, V = torch.linalg.svd(saved, full_matrices=False)
    assert torch.allclose(W, U @ V, atol=2e-2), "the nearest point, not a new start"
    model, _, state, _ = restored(run, overrides)
    assert_equal(dict(model.state_dict()), dict(state["model"]))


def test_tied_again_the_head_is_the_embedding(base, tmp_path, capsys):
    overrides = [*base[1], f"output_dir={tmp_path}/run"]
    train(compose([*overrides, "model.tied=false"]))
    model, _, state, notes = restored(tmp_path / "run", overrides)
    assert torch.equal(model.lm_head.weight, state["model"]["transformer.wte.weight"])
    assert "lm_head.weight: in the checkpoint, but not in this model" in notes


def test_a_model_of_which_nothing_fits_is_refused(copied):
    run, overrides = copied
    before = files(run)
    with pytest.raises(
        CheckpointError, match=r"none of its matrices fits(.|\n)*wte\.weight: starts from scratch \(320 x 16, 320 x 32"
    ):
        train(compose([*overrides, *RESUMED, "model.n_embd=32"]))
    assert files(run) == before


def test_a_model_of_which_vectors_alone_fit_is_refused_too():
    model = torch.nn.Sequential(torch.nn.LayerNorm(4, bias=False), torch.nn.Linear(4, 2, bias=False))
    saved = Loaded({"model": {"0.weight": torch.ones(4), "1.weight": torch.ones(3, 3)}}, Path("step_00000001"), 1)
    with pytest.raises(CheckpointError, match="none of its matrices fits"):
        take_weights(model, saved, allow_changes=True)


def test_other_data_is_refused_whatever_is_allowed(copied):
    run, overrides = copied
    data = state_of(run)["data"]
    for allowed in ("false", "true"):
        cfg = compose([*overrides, "resume=auto", f"allow_changes={allowed}"])
        assert find_checkpoint(cfg, run, data).step == 10
        with pytest.raises(CheckpointError, match=r"are not the data of the run") as refused:
            find_checkpoint(cfg, run, "another fingerprint")
        assert "allow_changes" not in str(refused.value)


def test_other_ranks_need_no_permission(copied, capsys):
    run, overrides = copied
    state = state_of(run)
    checkpoint.save(run / "checkpoints", 10, {**state, "rng": state["rng"] * 3})
    train(compose([*overrides, "resume=auto", "max_steps=11"]))
    assert "resumed from" in capsys.readouterr().out and state_of(run)["step"] == 11


# ---- states that are not ours ----

FOREIGN = {
    "other keys": lambda state: {"weights": state["model"]},
    "no configuration": lambda state: {**state, "config": [1]},
    "another configuration": lambda state: {**state, "config": {"model": {"width": 3}}},
    "another step": lambda state: {**state, "step": 3},
    "another model": lambda state: {**state, "model": {"encoder.weight": torch.zeros(3, 3)}},
    "other shapes": lambda state: {**state, "model": {k: v[:1] for k, v in state["model"].items()}},
    "no tensors": lambda state: {**state, "model": dict.fromkeys(state["model"], 3)},
}
FOREIGN_TO_TRAINING = {
    "optimizers of another kind": lambda state: {**state, "optimizers": {"AdamW": 3, "ManifoldMuon": {}}},
    "optimizers with numbers": lambda state: {
        **state,
        "optimizers": {
            "AdamW": {"state": {0: {"step": 3}}, "param_groups": [{"params": [0], "names": ["transformer.wte.weight"]}]}
        },
    },
    "random numbers": lambda state: {**state, "rng": [{"cpu": torch.zeros(3), "cuda": None}]},
    "no random numbers": lambda state: {**state, "rng": [3]},
    "stability": lambda state: {**state, "stability": {"best": 3.0}},
    "guard": lambda state: {**state, "guard": {"count": "many", "first": 3}},
}


@pytest.mark.parametrize("kind", [*FOREIGN, *FOREIGN_TO_TRAINING])
def test_a_foreign_state_is_named_with_its_cause(copied, tmp_path, capsys, kind):
    run, overrides = copied
    change = {**FOREIGN, **FOREIGN_TO_TRAINING}[kind]
    path = checkpoint.save(run / "checkpoints", 10, change(state_of(run)))
    before = files(run)
    for allowed in ("false", "true")[: 1 if kind == "another configuration" else 2]:  # which a permission allows
        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            train(compose([*overrides, "resume=auto", f"allow_changes={allowed}", "max_steps=12"]))
    assert files(run) == before
    if kind in FOREIGN:
        for command in (
            lambda: sample.main([str(run), "tokens=3"]),
            lambda: export.main([str(run), str(tmp_path / "x.pt")]),
        ):
            assert command() == 2
            err = capsys.readouterr().err
            assert str(path) in err and "Traceback" not in err
        assert not (tmp_path / "x.pt").exists()


# ---- stops ----


def test_a_stop_before_the_first_step_keeps_the_measured_metric(copied, monkeypatch):
    run, overrides = copied
    newest = load_newest(run / "checkpoints")
    assert newest.metric is not None

    class Stopping(module.StopSignal):
        def requested(self, ranks):
            self._agreed = 15
            return True

    monkeypatch.setattr(module, "StopSignal", Stopping)
    with pytest.raises(SystemExit):
        train(compose([*overrides, "resume=auto", "max_steps=12"]))
    again = load_newest(run / "checkpoints")
    assert (again.step, again.metric) == (10, newest.metric)
    with pytest.raises(SystemExit):  # at a step that was not evaluated, and then again
        train(compose([*overrides, "resume=auto", "max_steps=12", "checkpoint.interval=1"]))
    assert_equal(load_newest(run / "checkpoints").state["model"], newest.state["model"])


def test_an_unmeasured_checkpoint_stays_unmeasured(copied, monkeypatch):
    run, overrides = copied
    train(
        compose(
            [
                *overrides,
                "resume=auto",
                "max_steps=14",
                "checkpoint.interval=1",
                "eval_interval=7",
                "allow_changes=true",
            ]
        )
    )
    metrics = {p.name: checkpoint.load(p).metric for p in (run / "checkpoints").glob("step_*")}
    assert metrics["step_00000013"] is None and metrics["step_00000014"] is not None


def test_the_first_failure_is_remembered_over_a_stop(tiny, tmp_path, monkeypatch):
    """An update is left out at step 7; the run stops at step 8, before it reads its numbers back, and goes on."""
    plain, poison = module.accumulate, [7]

    def poisoned(model, *args):
        loss = plain(model, *args)
        poison[0] -= 1
        if poison[0] == 0:
            next(model.parameters()).grad[0, 0] = math.nan
        return loss

    monkeypatch.setattr(module, "accumulate", poisoned)
    overrides = [o for o in tiny if not o.startswith(("log.interval=", "max_steps"))] + ["log.interval=10"]
    cfg = compose([*overrides, "max_steps=20", "checkpoint.interval=8"])

    class Stopping(module.StopSignal):
        def requested(self, ranks):
            self._agreed = 15 if poison[0] == -1 else 0
            return bool(self._agreed)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(module, "StopSignal", Stopping)
        train(cfg)
    [before] = records(tmp_path / "run", "event")  # a checkpoint comes with all records up to it
    assert state_of(tmp_path / "run")["step"] == 8
    train(replace(cfg, resume="auto"))
    [event] = records(tmp_path / "run", "event")
    assert event == before
    assert event["step"] == 7 and event["message"] == "the gradient of transformer.wte.weight is not finite"
    assert records(tmp_path / "run", "train")[-1]["skipped_updates"] == 1


def test_the_guard_tells_its_first_failure_after_a_resume():
    alone, one = Ranks(0, 1, torch.device("cpu"), 1.0), torch.tensor(1.0)
    guard, later = (FiniteGuard(["a", "b"], torch.device("cpu")) for _ in range(2))
    assert guard.state_dict(alone) == {"count": 0, "first": None}
    guard.check(3, one, one, torch.tensor([1.0, math.inf]))
    guard.check(4, one, one, torch.tensor([math.nan, 1.0]))
    later.load_state_dict(guard.state_dict(alone))
    later.check(9, one, one, torch.tensor([math.nan, 1.0]))
    assert later.count == 3 and later.first(alone) == guard.first(alone) == (3, "the gradient of b", None)


def test_of_ranks_whose_loss_broke_at_once_the_first_is_named():
    three = SimpleNamespace(gather_objects=lambda fine: [True, fine, fine])
    guard, broken = FiniteGuard(["a"], torch.device("cpu")), torch.tensor(math.nan)
    guard.check(3, broken, broken, torch.tensor([math.nan]))
    assert guard.first(three) == (3, "the loss", 1)


# ---- files that a run does not write by itself ----


def test_yaml_tags_are_not_executed(copied, tmp_path, monkeypatch):
    from scripts import report

    run, overrides = copied
    crater = tmp_path / "crater"
    bomb = f"!!python/object/apply:os.mkdir ['{crater}']"
    (run / "config.yaml").write_text(bomb)
    assert report.main([str(run)]) == 2
    with pytest.raises(ConfigError, match=r"config\.yaml is not YAML of plain values"):
        plan_job(compose(overrides), run)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(CheckpointError, match="no checkpoint to resume from"):
        train(compose([*overrides, "resume=auto"]))
    assert not crater.exists()
    yaml.unsafe_load(bomb)
    assert crater.exists(), "the bomb itself must work, or this test shows nothing"


def test_the_files_of_a_run_are_whole_or_as_before(tmp_path, monkeypatch):
    from training.files import write_whole

    write_whole(tmp_path / "config.yaml", "a: 1\n")
    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"No space.*config\.yaml"):
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        write_whole(tmp_path / "config.yaml", "b: 2\n" * 1000)
    assert files(tmp_path) == {tmp_path / "config.yaml": b"a: 1\n"}


# ---- comparing configurations ----


def test_differences_list_each_changed_key():
    saved = {"seed": 1, "optim": {"lr": 0.1, "betas": [0.9, 0.95]}, "gone": True, "rules": {}}
    now = {
        "seed": 1,
        "optim": {"lr": 0.2, "betas": [0.9, 0.95]},
        "new": None,  # the same as absent
        "rules": {"*.attn.*": "dgram"},
    }
    assert differences(saved, saved) == []
    assert differences(saved, now) == [
        "gone: True → (absent)",
        "optim.lr: 0.1 → 0.2",
        "rules: {} → (absent)",
        "rules.*.attn.*: (absent) → dgram",
    ]
    assert differences(saved, now, ignore=("optim", "rules")) == ["gone: True → (absent)"]
    assert differences({"optimizer": 1}, {"optimizer": 2}, ignore=("optim",)) == ["optimizer: 1 → 2"]


def test_settings_that_change_numbers_are_compared_and_others_are_not():
    saved = compose([]).plain()
    for word in ("seed=2", "schedule.floor=0.2", "optim.muon.lr=0.3", "dtype=bfloat16", "global_batch_tokens=4096"):
        key = word.partition("=")[0]
        assert [line.partition(":")[0] for line in changes_of(saved, compose([word]))] == [key]
    assert changes_of(saved, compose(["checkpoint.keep=9", "log.interval=3"])) == []
    nu = ["experiment=nugpt_demo"]  # its rates depend on the number of steps
    steps = compose(nu).max_steps
    assert f"max_steps: {steps} → 7" in changes_of(compose(nu).plain(), compose([*nu, "max_steps=7"]))


@pytest.mark.parametrize(("change", "blocks", "size"), [("radius={c_attn: 3}", 1, 3), ("blocks={c_attn: 6}", 6, 1)])
def test_weights_come_onto_a_manifold_of_another_size_or_cut(copied, change, blocks, size):
    model, *_, notes = restored(*copied, f"optim.muon.{change}")  # attention on stiefel
    W = model.transformer.h[0].attn.c_attn.weight.detach().view(blocks, -1, 16) / size
    gram = W.mT @ W if blocks == 1 else W @ W.mT
    assert torch.allclose(gram, torch.eye(gram.size(-1)).expand_as(gram), atol=2e-2)
    assert any("c_attn.weight: brought onto its manifold" in note for note in notes)


def test_each_rank_goes_on_with_its_own_random_numbers(copied):
    run, overrides = copied
    cfg, state = compose([*overrides, "resume=auto"]), load_newest(run / "checkpoints").state
    other = {"cpu": torch.Generator().manual_seed(7).get_state(), "cuda": None}
    checkpoint.save(run / "checkpoints", 10, {**state, "rng": [state["rng"][0], other]})
    model, optimizers = build(cfg)
    guard = FiniteGuard([name for name, _ in model.named_parameters()], torch.device("cpu"))
    loaded = load_newest(run / "checkpoints")
    for rank in (1, 2):
        torch.manual_seed(3)
        expected = other["cpu"] if rank == 1 else torch.get_rng_state()  # there was no third rank
        assert restore(loaded, cfg, model, optimizers, Stability(cfg.stability), guard, rank=rank) == []
        assert torch.equal(torch.get_rng_state(), expected)
