"""ManifoldMuon shared out over gloo ranks: the weights of one rank, bitwise equal replicas, state with its owner only."""

import copy
import os
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from harness import finish, start_ranks

from optim.manifold_muon import ManifoldMuon
from optim.ownership import choose_owners, plan_messages
from optim.published import PublishedStep

SHAPES = [(24, 8), (8, 24), (8, 8), (24, 8), (16, 8), (24, 8), (32, 8)]  # seven matrices: uneven on 2, 3 and 4 ranks
MANIFOLDS = ["stiefel", "dgram", "oblique", "euclidean"]


def build():
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(*shape)) for shape in SHAPES]
    rule = PublishedStep(dual_steps=1, alpha=0.1, msign_steps=10, msign_dtype=torch.float32)
    groups = [{"params": params[i::4], "manifold": manifold} for i, manifold in enumerate(MANIFOLDS)]
    return params, ManifoldMuon(groups, rule, lr=0.02, momentum=0.95, nesterov=True, weight_decay=0.1)


def advance(params, optimizer, steps, wait=True):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(*p.shape, generator=generator)
        optimizer.step(wait=wait)
        optimizer.receive()


def work(folder):
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    params, optimizer = build()
    owned = len(optimizer.state)
    advance(params, optimizer, range(3))
    state = copy.deepcopy(optimizer.state_dict())  # a state dict holds the live tensors, as everywhere in torch
    assert len(optimizer.state) == owned  # gathering leaves nothing behind
    weights = [p.detach().clone() for p in params]
    copied, twin = copy.deepcopy((params, optimizer))
    again, resumed = build()
    resumed.load_state_dict(state)
    with torch.no_grad():
        for p, w in zip(again, weights):
            p.copy_(w)
    advance(params, optimizer, range(3, 5))
    advance(again, resumed, range(3, 5), wait=False)
    advance(copied, twin, range(3, 5))
    assert all(torch.equal(p, q) and torch.equal(p, r) for p, q, r in zip(params, again, copied))
    torch.save(
        {"weights": [p.detach() for p in params], "state": state, "owned": owned}, f"{folder}/rank{dist.get_rank()}.pt"
    )
    os._exit(0)  # the end of gloo's threads aborts a process now and then (torch 2.13), after all that is tested here


def test_every_matrix_is_in_one_message_of_its_owner():
    _, optimizer = build()
    for world in (2, 3, 20):
        owners = choose_owners(optimizer.param_groups, optimizer.rule, world)
        messages = [m for sent in plan_messages(optimizer.param_groups, owners, world) for m in sent]
        assert sorted(id(p) for _, params in messages for p in params) == sorted(map(id, owners))
        assert all(owners[p] == owner for owner, params in messages for p in params)


def test_weights_travel_while_the_next_bucket_is_computed(monkeypatch):
    """With a stand-in for the communication, that of rank 0 of two: what was begun is waited for only after all is computed."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    params, optimizer = build()
    calls, update = [], optimizer._update

    def broadcast(flat, src, async_op):
        assert async_op
        calls.append("send")
        return SimpleNamespace(wait=lambda: calls.append("wait"))

    monkeypatch.setattr(dist, "broadcast", broadcast)
    monkeypatch.setattr(optimizer, "_update", lambda *args: calls.append("compute") or update(*args))
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step(wait=False)
    expected = []
    for i, sent in enumerate(optimizer.messages):
        expected += ["compute"] * (i < len(optimizer.buckets)) + ["send"] * len(sent)
    assert calls == expected and calls.count("compute") > 1
    optimizer.receive()
    assert calls == expected + ["wait"] * expected.count("send")


@pytest.fixture(scope="module")
def single():
    params, optimizer = build()
    advance(params, optimizer, range(3))
    state = {k: {n: v.clone() for n, v in s.items()} for k, s in optimizer.state_dict()["state"].items()}
    advance(params, optimizer, range(3, 5))
    return [p.detach() for p in params], state


@pytest.mark.timeout(120)
@pytest.mark.parametrize("world", [2, 3, 4])
def test_any_number_of_ranks_takes_the_same_steps(world, single, tmp_path):
    assert finish(start_ranks(world, work, str(tmp_path))) == [0] * world
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(world)]
    weights, state = single
    for result in ranks:
        for mine, first, alone in zip(result["weights"], ranks[0]["weights"], weights):
            assert torch.equal(mine, first)  # replicas: bitwise
            assert torch.linalg.norm(mine - alone) < 1e-4 * torch.linalg.norm(
                alone
            )  # batches of another size round otherwise
        for index, saved in state.items():
            assert torch.allclose(result["state"]["state"][index]["momentum"], saved["momentum"], atol=1e-6)
    assert sum(result["owned"] for result in ranks) == len(SHAPES)
    assert max(result["owned"] for result in ranks) < len(SHAPES)
