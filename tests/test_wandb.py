"""W&B is shown the records of a run: curves by layer, and nothing of it can stop training."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
import time
import types
from pathlib import Path
from statistics import fmean

import pytest
import torch
from conftest import ROOT

from model.gpt import GPT, GPTConfig
from model.probes import probe
from model.spectra import Spectra
from train import train
from training.build import build_optimizers, gpt_config
from training.config import compose
from training.log import RunLog, read_records
from training.start import tags_of
from training.wandb_sink import OVER_HEADS, WANDB_RUNS_FILE, WandbSink, flatten


def test_curves_come_from_the_records_alone():
    sigma = [3.0, 2.0, 1.0]
    spectrum = {
        "kind": "spectra",
        "step": 5,
        "name": "transformer.h.3.attn.c_attn.weight",
        "sigma": sigma,
        "off": 0.5,
        "why": None,
    }
    assert dict(flatten(spectrum)) == {
        "layer_03/attn/c_attn/sigma": sigma,
        "layer_03/attn/c_attn/sigma_max": 3.0,
        "layer_03/attn/c_attn/sigma_min": 1.0,
        "layer_03/attn/c_attn/stable_rank": pytest.approx(14 / 9),
        "layer_03/attn/c_attn/off": 0.5,
    }
    certificate = {"kind": "certificate", "step": 5, "name": "transformer.h.12.mlp.c_fc.weight", "feas": 0.9}
    assert dict(flatten(certificate)) == {"layer_12/mlp/c_fc/certificate/feas": 0.9}
    update = {"kind": "update", "step": 5, "name": "transformer.h.12.mlp.c_fc.weight", "size": 0.1, "input_max": None}
    assert dict(flatten(update)) == {"layer_12/mlp/c_fc/update/size": 0.1}
    outside = {"kind": "spectra", "step": 5, "name": "lm_head.weight", "off": 0.5}
    assert dict(flatten(outside)) == {"weights/lm_head/off": 0.5}
    assert dict(flatten({"kind": "train", "step": 1, "loss": 2.0, "lr": {"adamw": 0.1}})) == {
        "train/loss": 2.0,
        "train/lr/adamw": 0.1,
    }
    assert dict(flatten({"kind": "eval", "step": 1, "loss": 2.0})) == {"val/loss": 2.0}
    assert dict(flatten({"kind": "full_eval", "step": 1, "loss": 2.0}))["val/full/loss"] == 2.0
    assert dict(flatten({"kind": "spectra", "step": 1, "w": {"sigma": [0.0, 0.0]}}))["spectra/w/stable_rank"] == 0.0


def test_nothing_that_a_probe_measures_is_dropped():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=40, n_layer=3, n_head=2, n_embd=16))
    seen = probe(model, torch.randint(40, (2, 16)))
    curves = dict(flatten({"kind": "probe", "step": 0, **seen}))
    assert all(isinstance(value, float) for value in curves.values()), "scalars, from which W&B draws curves"
    for key, value in seen.items():
        if isinstance(value, dict):
            assert curves[f"probe/{key}/path"] == value["path"] and curves[f"probe/{key}/size/06"] == value["size"][6]
            assert curves[f"probe/{key}/turn_attn/02"] == value["turn_attn"][2]
        elif not isinstance(value, list):
            assert curves[f"probe/{key}"] == value
        elif isinstance(value[0], list):
            for i, heads in enumerate(value):
                for curve, reduce in OVER_HEADS.get(key, {key: fmean}).items():
                    assert curves[f"layer_{i:02d}/attn/{curve}"] == reduce(heads)
        else:
            assert curves[f"embedding/stream/{key}"] == value[0] and curves[f"layer_02/stream/{key}"] == value[3]
    assert curves["layer_01/attn/logit_max"] == max(seen["logit_max"][1])
    assert {path.split("/")[0] for path in curves} == {"probe", "embedding", "layer_00", "layer_01", "layer_02"}
    W = model.transformer.h[1].mlp.c_fc.weight
    for name, record in Spectra({"transformer.h.1.mlp.c_fc.weight": (W, None, 1)}).records():
        curves = dict(flatten({"kind": "spectra", "step": 0, "name": name, **record}))
    assert curves["layer_01/mlp/c_fc/sigma_max"] == record["sigma"][0]
    assert curves["layer_01/mlp/c_fc/sigma_min"] == record["sigma"][-1]


def test_learned_scales_have_a_curve_for_each_layer():
    record = {"kind": "scales", "step": 1, "name": "alpha_attn", "mean": [0.1, 0.2], "least": [0.0, math.nan]}
    curves = dict(flatten(record))
    assert list(curves) == [f"scales/alpha_attn/layer_0{i}/{key}" for key in ("mean", "least") for i in (0, 1)]
    assert curves["scales/alpha_attn/layer_01/mean"] == 0.2
    assert dict(flatten({**record, "name": "s_z", "mean": 3.0, "least": 2.0})) == {
        "scales/s_z/mean": 3.0,
        "scales/s_z/least": 2.0,
    }


def test_a_head_that_is_not_a_number_makes_its_layer_none():
    curves = dict(flatten({"kind": "probe", "step": 0, "logit_max": [[1.0, math.nan], [1.0, 2.0]]}))
    assert math.isnan(curves["layer_00/attn/logit_max"]) and curves["layer_01/attn/logit_max"] == 2.0


def wandb_sink(directory: Path, mode: str, resume: bool = False, **more) -> WandbSink:
    return WandbSink(
        mode=mode, project="p", group="g", name="n", config={"seed": 1}, directory=directory, resume=resume, **more
    )


class FakeWandb(types.ModuleType):
    """Stands for the package: keeps what it is asked for; ``failure`` is raised by init."""

    def __init__(self, failure: Exception | None = None):
        super().__init__("wandb")
        self.failure = failure
        self.started: list[dict] = []
        self.logged: list[dict] = []
        self.metrics: dict[str, dict] = {}
        self.finished = 0
        self.Settings = self.Histogram = lambda *args, **kwargs: args or kwargs

    def init(self, **arguments):
        if self.failure:
            raise self.failure
        self.started.append(arguments)
        return self

    def define_metric(self, name, **arguments):
        self.metrics[name] = arguments

    def log(self, payload):
        self.logged.append(payload)

    def finish(self):
        self.finished += 1


@pytest.mark.parametrize("failure", [RuntimeError("no\nAPI key"), None], ids=repr)
def test_wandb_that_cannot_start_gives_one_warning(tmp_path, monkeypatch, caplog, failure):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(failure) if failure else None)
    log = RunLog(tmp_path, [wandb_sink(tmp_path, "online")])
    for step in range(3):
        log.write("train", step, loss=1.0)
    log.close()
    assert len(caplog.records) == 1 and caplog.records[0].levelno == logging.WARNING
    assert "training continues" in caplog.text and "logger.mode=offline" in caplog.text
    assert len(list(read_records(tmp_path))) == 3


def test_wandb_disabled_is_not_even_imported(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    sink = wandb_sink(tmp_path, "disabled")
    sink.record({"kind": "train", "step": 1, "loss": 1.0})
    sink.close()
    assert not caplog.records and not os.listdir(tmp_path)


def test_wandb_sees_our_step_and_no_number_that_it_cannot_draw(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    sink = wandb_sink(tmp_path, "offline")
    sink.record({"kind": "spectra", "step": 4, "name": "w", "sigma": [2.0, math.nan], "dead": [math.nan]})
    sink.close()
    sink.close()
    assert fake.metrics["*"] == {"step_metric": "step"} and fake.metrics["val/loss"]["summary"] == "min"
    assert fake.logged[0]["step"] == 4 and fake.logged[0]["weights/w/sigma"] == ([2.0],)
    assert "weights/w/dead" not in fake.logged[0]
    assert fake.finished == 1


def test_wandb_continues_online_and_links_offline(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for mode, resume in [("online", False), ("online", True), ("offline", True), ("offline", True), ("online", True)]:
        wandb_sink(tmp_path, mode, resume).close()
    online, again, offline, second, back = fake.started
    assert again["id"] == online["id"] and again["resume"] == "allow"
    ids = {run["id"] for run in (online, offline, second, back)}
    assert len(ids) == 4, "an offline run cannot be appended to, and the online one lacks its records"
    assert {(run["group"], run["name"], run["project"]) for run in fake.started} == {("g", "n", "p")}
    assert "continues" not in online["config"] and "continues" not in again["config"]
    assert offline["config"]["continues"] == [online["id"]]
    assert second["config"] == {"seed": 1, "continues": [online["id"], offline["id"]]}
    wandb_sink(tmp_path, "online", resume=False).close()
    assert fake.started[-1]["id"] not in ids


def test_an_offline_run_with_a_given_id_is_sent_whole_too(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_RUN_ID", "given")
    wandb_sink(tmp_path, "offline").close()
    wandb_sink(tmp_path, "offline", resume=True, history=[{"kind": "eval", "step": 5, "loss": 1.0}]).close()
    assert [run["id"] for run in fake.started] == ["given"] * 2 and len(fake.logged) == 1


def test_a_run_that_w_and_b_cannot_continue_is_sent_whole(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    history = [{"kind": "eval", "step": step, "loss": 1.0} for step in (0, 5)]
    back = [("offline", True, 2), ("online", True, 2)]
    for mode, resume, sent in [
        ("offline", False, 0),
        ("offline", True, 2),
        ("online", True, 2),
        ("online", True, 0),
        *back,
    ]:
        fake.logged.clear()
        wandb_sink(tmp_path, mode, resume, history=history if resume else (), tags=["Hetero", "x" * 99]).close()
        assert len(fake.logged) == sent
        if mode == "offline" and not resume:
            half = tmp_path / "wandb" / f"offline-run-20260101_000000-{fake.started[-1]['id']}"
            half.mkdir(parents=True)
        assert fake.started[-1]["tags"] == ["Hetero", "x" * 64]
    assert not half.exists() and (tmp_path / "wandb_earlier" / half.name).is_dir()


def test_a_resumed_run_tells_w_and_b_its_sweep_tags_and_all_its_records(tiny, tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    words = [
        *(word for word in tiny if not word.startswith("logger")),
        "logger.mode=offline",
        "optim=paper",
        "name=mine",
    ]
    train(compose([*words, "max_steps=5", "schedule.decay_steps=20"]))
    first, logged = fake.started[-1], list(fake.logged)
    assert first["group"] == tmp_path.name and first["tags"] == ["Hetero", "ManifoldMuon", "published", "text"]
    assert first["name"] == "mine"
    fake.logged.clear()
    resumed = compose([*words, "max_steps=7", "schedule.decay_steps=20", "resume=auto"])
    train(resumed)
    ends = [payload for payload in logged if "end/best_val_loss" in payload]
    assert fake.logged[: len(logged)] == logged and len(ends) == 1
    assert max(payload["step"] for payload in fake.logged) == 7


@pytest.mark.parametrize(
    ("words", "optimizer"),
    [
        (["assignment=unconstrained", "optim=sgd"], "SGD"),
        (["assignment=unconstrained", "optim=modular"], "Modular"),
        (["assignment=adamw"], "AdamW"),
    ],
)
def test_a_run_without_manifold_muon_has_no_tag_of_its_step_rule(words, optimizer):
    cfg = compose(words)
    with torch.device("meta"):
        optimizers = build_optimizers(GPT(gpt_config(cfg)), cfg)
    assert tags_of(cfg, optimizers) == [cfg.assignment.name, optimizer, "stdlib"]


def test_wandb_offline_for_real(tmp_path, caplog):
    pytest.importorskip("wandb")
    log = RunLog(tmp_path, [wandb_sink(tmp_path, "offline")])
    log.write("train", 1, loss=2.0, lr=0.1, tokens_per_s=1000.0)
    log.write("eval", 1, loss=math.nan)
    log.write("spectra", 1, name="transformer.h.0.attn.c_attn.weight", sigma=torch.linspace(2, 0.5, 16))
    log.write("event", 1, event="unstable", message="validation loss is nan")
    log.close()
    # W&B's own lines are its own affair.
    ours = [record.message for record in caplog.records if record.name.startswith("training")]
    assert not ours, "it started, took every record and finished"
    (run,) = json.loads((tmp_path / WANDB_RUNS_FILE).read_text())
    (written,) = (tmp_path / "wandb").glob(f"offline-run-*-{run['id']}/run-{run['id']}.wandb")
    keys = (
        "train/loss",
        "train/tokens_per_s",
        "val/loss",
        "layer_00/attn/c_attn/sigma_max",
        "stable_rank",
        "histogram",
    )
    for _ in range(100):  # W&B's own process writes the file, and may still be at it on a busy machine
        content = written.read_bytes()
        if all(key.encode() in content for key in keys):
            return
        time.sleep(0.2)
    pytest.fail(f"{[key for key in keys if key.encode() not in content]} never reached {written}")


def test_the_panels_of_the_documented_workspace_are_curves(tiny, tmp_path):
    train(compose([*tiny, "residual=geonorm", "max_steps=2", "eval_interval=2", "log.interval_spectra=2"]))
    curves = {name for record in read_records(tmp_path / "run") for name, _ in flatten(record)}
    page = (ROOT / "docs" / "runs.md").read_text()
    table = page.split("| panel of the report | curves |")[1].split("\n\n")[0]
    panels = [found.replace("\\|", "|") for found in re.findall(r"`([^`]+)`", table)]
    assert len(panels) == 10
    for panel in panels:
        assert any(re.fullmatch(panel, name) for name in curves), panel
