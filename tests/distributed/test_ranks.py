"""The same training on any number of ranks: losses, weights, replicas, and a checkpoint that changes hands."""

import pytest
import torch
from harness import finish, start_ranks

from optim.manifolds import MANIFOLDS
from train import train
from training import checkpoint
from training.config import compose
from training.log import read_records

SHAPE = [
    "global_batch_tokens=192",
    "micro_batch_size=1",
    "launcher.checksum_interval=1",
]  # 12 windows: for 1, 2, 3, 4 ranks


@pytest.fixture
def settings(tiny):
    """Overrides of a two-layer run without a directory: eight matrices, uneven on three ranks."""
    replaced = {s.split("=")[0] for s in SHAPE} | {"output_dir", "model.n_layer"}
    return [o for o in tiny if o.split("=")[0] not in replaced] + SHAPE + ["model.n_layer=2"]


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


@pytest.mark.timeout(240)
@pytest.mark.parametrize("assignment", ["unconstrained", "all_stiefel", "all_dgram", "hetero_inv", "adamw"])
def test_every_assignment_on_two_ranks(settings, tmp_path, assignment):
    few = [*settings, f"assignment={assignment}", "max_steps=4"]
    alone, shared = (train_on(world, tmp_path / str(world), few) for world in (1, 2))
    assert losses(shared) == pytest.approx(losses(alone), abs=1e-3)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("optim", ["torch_muon", "modular"])
def test_optimizers_that_compute_every_step_on_every_rank(settings, tmp_path, optim):
    few = [*settings, f"optim={optim}", "assignment=unconstrained", "max_steps=4"]
    alone, shared = (train_on(world, tmp_path / str(world), few) for world in (1, 2))
    assert losses(shared) == pytest.approx(losses(alone), abs=1e-3)
    assert state(shared)["optimizers"].keys() == state(alone)["optimizers"].keys()


@pytest.mark.timeout(240)
def test_ranks_whose_last_micro_batch_is_smaller(settings, tmp_path):
    """14 windows: seven twos alone, four and three on each of two ranks. The largest logit of QK-clip is that of all ranks and micro-batches."""
    few = [o for o in settings if o.split("=")[0] not in ("global_batch_tokens", "micro_batch_size")]
    few += ["global_batch_tokens=224", "micro_batch_size=4", "max_steps=4"]
    few += ["attention=qk_clip", "attention.qk_clip=1e-3", "model.rope=true"]
    alone, shared = (train_on(world, tmp_path / str(world), few) for world in (1, 2))
    assert losses(shared)[0] == pytest.approx(losses(alone)[0], abs=1e-5)
    assert norms(shared)[0] == pytest.approx(norms(alone)[0], rel=1e-5)
    assert losses(shared) == pytest.approx(losses(alone), abs=1e-3)
    for layer in (0, 1):
        ours, theirs = (state(d)["model"][f"transformer.h.{layer}.attn.qk_clip.gain"] for d in (shared, alone))
        assert (ours < 0.5).all() and torch.allclose(ours, theirs, rtol=1e-3)


@pytest.mark.timeout(240)
def test_the_published_step_on_two_ranks(settings, tmp_path):
    """Its solver is chaotic, so only the first step, the constraint, and equal replicas (compared by the run) can be asked for."""
    few = [*settings, "optim=paper", "max_steps=4", "optim.muon.rule.dual_steps=4"]
    alone, shared = (train_on(world, tmp_path / str(world), few) for world in (1, 2))
    assert losses(shared)[0] == pytest.approx(losses(alone)[0], abs=1e-5)
    for name, W in state(shared)["model"].items():
        if ".attn." in name:
            assert MANIFOLDS["stiefel"].residual(W) < 2e-2
        elif ".mlp." in name:
            assert MANIFOLDS["dgram"].residual(W) < 1e-5


@pytest.mark.timeout(240)
def test_a_checkpoint_of_two_ranks_goes_on_with_one_and_with_four(settings, tmp_path):
    alone = train_on(1, tmp_path / "alone", settings)
    for world in (1, 4):
        directory = tmp_path / f"from2to{world}"
        train_on(2, directory, [*settings, "max_steps=10", "schedule.decay_steps=20"])
        train_on(world, directory, [*settings, "schedule.decay_steps=20", "resume=auto"])
        assert losses(directory) == pytest.approx(losses(alone), abs=1e-3)
