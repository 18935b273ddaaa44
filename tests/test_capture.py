"""The update as a graph, with a stand-in that repeats recorded operations on recorded tensors, as a CUDA graph does.

tests/cuda has the real one.
"""

import pytest
import torch
from device_checks import Training
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from optim.stack import OnHost
from training.capture import WARM_UP

READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default, torch.ops.aten.nonzero.default)


class NoHostReads(TorchDispatchMode):
    """Refuses every operation that hands a number of the device to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in READS, f"{func} reads from the device"
        return func(*args, **(kwargs or {}))


class Recording(TorchDispatchMode):
    """Writes down every operation with the very tensors it was given and has returned; before: what was written to, as it was."""

    def __init__(self):
        super().__init__()
        self.calls, self.before = [], {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in READS, f"{func} cannot be recorded"
        for argument, value in zip(func._schema.arguments, args):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for t in tensors(value):
                    self.before.setdefault(id(t), (t, t.clone()))
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


def record(call):
    """Records a call without making it: what it writes to is put back. The replay writes into the tensors of the recording."""
    recording = Recording()
    with torch.no_grad(), recording:
        call()
    with torch.no_grad():
        for t, before in reversed(recording.before.values()):
            t.copy_(before)
    return replay_of(recording.calls)


def replay_of(calls):
    """Makes the calls again."""

    @torch.no_grad()
    def replay():
        for func, args, kwargs, out in calls:
            again = func(*args, **kwargs)
            for old, new in zip(tensors(out), tensors(again), strict=True):
                if old.data_ptr() != new.data_ptr():  # neither in place nor a view
                    old.copy_(new)

    return replay


def tensors(out):
    found = []
    tree_map_only(torch.Tensor, found.append, out)
    return found


@pytest.mark.parametrize("overrides", [["assignment=hetero"], ["assignment=adamw"], ["assignment=all_dgram"]])
def test_replayed_updates_are_the_usual_ones(overrides):
    """Other gradients, another learning rate each time, refused updates, a watched one, and one that needs a second round."""
    usual, captured = (Training(*overrides, autocast=False) for _ in range(2))
    for run in (usual, captured):  # the usual one too, so that its learning rates are tensors as well
        run.optimizers.capture(record)
    usual.optimizers.captured = None
    muon = [run.optimizers.muon for run in (usual, captured)]
    for step in range(WARM_UP + 8):
        for m in muon:
            if m is not None:
                m.watched = step == WARM_UP + 2
                if step == WARM_UP + 4:
                    m.buckets[0].state["level"].fill_(1.0)
                    m.buckets[0].highest = None
        a, b = (run.advance(poison=step in (WARM_UP + 1, WARM_UP + 3)) for run in (usual, captured))
        assert torch.equal(a[0], b[0])
        assert all(torch.equal(w, captured.weights()[name]) for name, w in usual.weights().items()), step
    assert captured.guard.count == 2 and len(captured.optimizers.captured.graphs) >= 1
    if muon[0] is not None:
        for name in muon[0].state_dict()["state"][0]:
            assert torch.equal(*(m.state_dict()["state"][0][name] for m in muon))


def test_learning_rates_in_tensors_round_to_float32():
    """The only difference that `capture` makes: AdamW's rate is a float32 number, which changes a weight by a few last bits."""
    plain, captured = (Training("assignment=adamw", autocast=False) for _ in range(2))
    captured.optimizers.capture(record)
    for _ in range(3):
        plain.advance()
        captured.advance()
    for name, w in plain.weights().items():
        torch.testing.assert_close(captured.weights()[name], w, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("assignment", ["hetero", "unconstrained"])
def test_nothing_of_a_step_is_read_by_the_host(assignment, monkeypatch):
    """Refused updates included; but for the levels, which the host reads a step later from its own memory."""
    run = Training(f"assignment={assignment}", "attention=qk_clip", "attention.qk_clip_on=gain", autocast=False)
    run.advance()
    monkeypatch.setattr(OnHost, "read", lambda self: 0)
    before = run.weights()
    addresses = [t.data_ptr() for t in fixed(run)]
    with NoHostReads():
        run.advance(poison=True)
    assert all(torch.equal(w, before[name]) for name, w in run.weights().items())
    with NoHostReads():
        run.advance()
    assert [t.data_ptr() for t in fixed(run)] == addresses
    with pytest.raises(AssertionError, match="reads from the device"), NoHostReads():
        run.params["transformer.wte.weight"].sum().item()


def fixed(run):
    """The tensors that must stay where they are."""
    yield from run.params.values()
    for optimizer in run.optimizers:
        for state in optimizer.state.values():
            yield from state.values()
        yield from (group["lr"] for group in optimizer.param_groups if torch.is_tensor(group["lr"]))
