"""The same training on any number of ranks: losses, weights, replicas, and a checkpoint that changes hands."""

import pytest
import torch
from harness import finish, free_port, start_ranks, train_all

from optim.manifolds import MANIFOLDS
from train import train
from training import checkpoint
from training.config import compose
from training.log import read_records

RUN = [
    *("model.n_layer=2", "model.n_head=2", "model.n_embd=16", "model.block_size=16", "max_steps=20"),
    *("global_batch_tokens=192", "micro_batch_size=1"),  # 12 windows: for 1, 2, 3, 4 ranks
    *("eval_interval=5", "eval_windows=4", "full_eval=false", "schedule.warmup_steps=2", "log.interval=1"),
    *("log.interval_spectra=10", "checkpoint.interval=5", "logger.mode=disabled", "device=cpu"),
    "launcher.checksum_interval=1",
]
ASSIGNMENTS = ["unconstrained", "all_stiefel", "all_dgram", "hetero_inv", "adamw"]
EVERYWHERE = ["torch_muon", "modular"]  # optimizers that compute every step on every rank
SHORT = {  # further overrides of runs of four steps
    **{assignment: [f"assignment={assignment}"] for assignment in ASSIGNMENTS},
    **{optim: [f"optim={optim}", "assignment=unconstrained"] for optim in EVERYWHERE},
    "uneven": [
        *("global_batch_tokens=224", "micro_batch_size=4"),
        *("attention=qk_clip", "attention.qk_clip=1e-3", "model.rope=true"),
    ],
    "published": ["optim=paper", "optim.muon.rule.dual_steps=4"],
}


@pytest.fixture(scope="module")
def settings(tiny_data):
    """Overrides of a two-layer run without a directory: eight matrices, uneven on three ranks."""
    return [*tiny_data, *RUN]


def train_on(world, directory, overrides):
    """Train on that many ranks; what went wrong stands in the failure's message."""
    cfg, output = compose([*overrides, f"output_dir={directory}"]), directory.parent / f"{directory.name}.txt"
    if world == 1:
        train(cfg)
    else:
        codes = finish(start_ranks(world, train, cfg, output=str(output)), timeout=100)
        assert codes == [0] * world, output.read_text()
    return directory


def losses(directory, kind="train"):
    return [record["loss"] for record in read_records(directory, kind)]


def norms(directory):
    return [record["grad_norm"] for record in read_records(directory, "train")]


def state(directory):
    return checkpoint.load_newest(directory / "checkpoints").state


@pytest.mark.timeout(240)
def test_one_to_four_ranks_train_alike(settings, tmp_path):
    """Replicas are compared bit by bit after every step by the run itself."""
    alone = train_on(1, tmp_path / "1", settings)
    for world in (2, 3, 4):
        shared = train_on(world, tmp_path / str(world), settings)
        assert losses(shared)[0] == pytest.approx(losses(alone)[0], abs=1e-5)
        assert norms(shared)[0] == pytest.approx(norms(alone)[0], rel=1e-5)
        assert losses(shared) == pytest.approx(losses(alone), abs=1e-3)
        assert losses(shared, "eval") == pytest.approx(losses(alone, "eval"), abs=1e-3)
        a, b = state(shared), state(alone)
        for name, W in b["model"].items():
            assert torch.linalg.norm(a["model"][name] - W) < 1e-2 * torch.linalg.norm(W), name
        saved, expected = (s["optimizers"]["ManifoldMuon"]["state"] for s in (a, b))
        assert saved.keys() == expected.keys()  # gathered from the owners: nothing is missing
        assert {r["name"] for r in read_records(shared, "certificate")} == {
            r["name"] for r in read_records(alone, "certificate")
        }


@pytest.fixture(scope="module")
def short(settings, tmp_path_factory):
    """A function of the name of a short run: its directories, of one rank and of two. All those of two ranks are trained at once."""
    folder = tmp_path_factory.mktemp("short")

    def settings_of(name, world):
        return compose([*settings, *SHORT[name], "max_steps=4", f"output_dir={folder}/{name}_{world}"])

    cfgs, output = [settings_of(name, 2) for name in SHORT], folder / "output.txt"
    codes = finish(start_ranks(2, train_all, cfgs, [free_port() for _ in cfgs], output=str(output)), timeout=200)
    assert codes == [0, 0], output.read_text()

    def directories(name):
        train(settings_of(name, 1))
        return folder / f"{name}_1", folder / f"{name}_2"

    return directories


@pytest.mark.timeout(240)
@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_every_assignment_on_two_ranks(short, assignment):
    alone, shared = short(assignment)
    assert losses(shared) == pytest.approx(losses(alone), abs=1e-3)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("optim", EVERYWHERE)
def test_optimizers_that_compute_every_step_on_every_rank(short, optim):
    alone, shared = short(optim)
    assert losses(shared) == pytest.approx(losses(alone), abs=1e-3)
    assert state(shared)["optimizers"].keys() == state(alone)["optimizers"].keys()


@pytest.mark.timeout(240)
def test_ranks_whose_last_micro_batch_is_smaller(short):
    """14 windows: seven twos alone, four and three on each of two ranks. The largest logit of QK-clip is that of all ranks and micro-batches."""
    alone, shared = short("uneven")
    assert losses(shared)[0] == pytest.approx(losses(alone)[0], abs=1e-5)
    assert norms(shared)[0] == pytest.approx(norms(alone)[0], rel=1e-5)
    assert losses(shared) == pytest.approx(losses(alone), abs=1e-3)
    for layer in (0, 1):
        ours, theirs = (state(d)["model"][f"transformer.h.{layer}.attn.qk_clip.gain"] for d in (shared, alone))
        assert (ours < 0.5).all() and torch.allclose(ours, theirs, rtol=1e-3)


@pytest.mark.timeout(240)
def test_the_published_step_on_two_ranks(short):
    """Its solver is chaotic, so only the first step, the constraint, and equal replicas (compared by the run) can be asked for."""
    alone, shared = short("published")
    assert losses(shared)[0] == pytest.approx(losses(alone)[0], abs=1e-5)
    for name, W in state(shared)["model"].items():
        if ".attn." in name:
            assert MANIFOLDS["stiefel"].distance(W) < 2e-2
        elif ".mlp." in name:
            assert MANIFOLDS["dgram"].distance(W) < 1e-5


@pytest.mark.timeout(240)
def test_a_checkpoint_of_two_ranks_goes_on_with_one_and_with_four(settings, tmp_path):
    alone = train_on(1, tmp_path / "alone", settings)
    for world in (1, 4):
        directory = tmp_path / f"from2to{world}"
        train_on(2, directory, [*settings, "max_steps=10", "schedule.decay_steps=20"])
        train_on(world, directory, [*settings, "schedule.decay_steps=20", "resume=auto"])
        assert losses(directory) == pytest.approx(losses(alone), abs=1e-3)


def test_ranks_draw_different_random_numbers(tiny_data, tmp_path):
    shared = train_on(3, tmp_path / "3", [*tiny_data, *RUN, "max_steps=1", "assignment=adamw"])
    assert len({bytes(rng["cpu"].numpy()) for rng in state(shared)["rng"]}) == 3
