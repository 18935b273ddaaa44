"""Updates on fake CUDA tensors, which have shapes and devices but no numbers: on a CPU, this finds what mixes devices or reads the device."""

import pytest
import torch
from device_checks import GPT, settings
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from optim import linalg, manifold_muon
from training.build import build_optimizers, gpt_config
from training.step import FiniteGuard, clip

pytestmark = pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason="this torch is built without CUDA, and refuses fake CUDA tensors too"
)


class Start(TorchDispatchMode):
    """What is made once may read the device: every number is 0.02."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return 0.02 if func is torch.ops.aten._local_scalar_dense.default else func(*args, **(kwargs or {}))


class NothingToHost(TorchDispatchMode):
    """An operation that brings a tensor from the device to the host is an error. Reading a number of a fake tensor is one anyway."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        taken, given = ({t.device.type for t in tree_leaves(x) if torch.is_tensor(t)} for x in ((args, kwargs), out))
        assert "cuda" not in taken or "cpu" not in given, f"{func} brings a tensor to the host"
        return out


@pytest.fixture
def level(monkeypatch):
    """A list with the level that the host knows of every bucket; nothing is compiled, and no fake number stays in a cache."""
    known = [0]

    class Known:
        def __init__(self, number):
            assert number.is_cuda

        def read(self):
            return known[0]

    monkeypatch.setattr(manifold_muon, "OnHost", Known)
    monkeypatch.setattr(manifold_muon, "compiled_whole", lambda function: function)
    linalg._cap_fit.cache_clear()
    yield known
    linalg._cap_fit.cache_clear()


def test_an_update_stays_on_its_device(level):
    """With the products of a GPU, for every level, after an update that creates what stays."""
    cfg = settings("assignment=hetero", "compile=false", "optim.muon.rule.compile=false", device="cuda")
    where = torch.device("cuda")
    with FakeTensorMode():
        with Start(), where:
            model = GPT(gpt_config(cfg))
            optimizers = build_optimizers(model, cfg, model.unit_vectors())
        guard = FiniteGuard([name for name, _ in model.named_parameters()], where)
        for p in model.parameters():
            p.grad = torch.empty_like(p)

        def update():
            norms = clip([p.grad for p in model.parameters()], 1.0)[1]
            loss = torch.zeros((), device=where)
            optimizers.set_lr(0.5)
            optimizers.step(skip=guard.check(1, loss, loss.clone(), norms))

        with Start():
            update()
        with NothingToHost():
            for level[0] in (0, 1, 2):
                update()
        number = torch.zeros((), device=where)
        with pytest.raises(AssertionError, match="to the host"), NothingToHost():
            number.cpu()
        with pytest.raises(DataDependentOutputException):
            number.sqrt().item()
