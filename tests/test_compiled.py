"""What is compiled is what is meant, as far as it shows without a GPU: gradients, programs, steps; tests/cuda has the rest."""

import functools
import operator
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from device_checks import (
    MODELS,
    check_certificates,
    check_compiled_gradients,
    check_manifolds_hold,
    check_no_low_precision_in_steps,
    check_no_sync,
    check_programs,
    check_ranks,
    check_step_equals_the_cpus,
    one_rank,
    settings,
    small_chunks,
    windows,
)
from torch._dynamo.backends.debugging import aot_eager

from model import loss as loss_module
from model.gpt import GPT
from training.build import gpt_config
from training.checks import check
from training.machine import compiled
from training.step import accumulate, mean_loss
from training.validate import ConfigError, problems_of_compiler

QUICK = ["geonorm", "nGPT", "all switches", "chunked loss"]
SPHERES = ["proj_sphere", "cayley_sphere", "p_sphere", "ngpt"]
CASTS = {"to", "float", "double", "type_as", "bfloat16", "half"}


@pytest.mark.parametrize("name", [*QUICK, *SPHERES, "stream in bfloat16"])
def test_compiled_gradients_equal_eager_ones_and_no_cast_returns_its_argument(name):
    seen = []

    def look_and_compile(graph, inputs):
        seen.extend(aliases(graph))
        return aot_eager(graph, inputs)

    check_compiled_gradients(name, "cpu", autocast=True, backend=look_and_compile)
    assert not seen


@pytest.mark.campaign
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", MODELS)
def test_all_compiled_gradients_equal_eager_ones(name, backend, autocast):
    check_compiled_gradients(name, "cpu", autocast, backend)


@pytest.mark.parametrize("autocast", [False, pytest.param(True, marks=pytest.mark.campaign)])
@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.campaign) for n in MODELS])
def test_no_cast_returns_its_argument(name, autocast):
    """Of such an alias torch 2.11 loses the gradient: none may be in what Dynamo hands to the compiler, on any version."""
    torch._dynamo.reset()
    model, seen = GPT(gpt_config(settings(*MODELS[name]))), []

    def look(graph, _):
        seen.extend(aliases(graph))
        return graph.forward

    tokens = torch.from_numpy(windows(4).astype("int64"))
    with small_chunks(name == "chunked loss"), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        torch.compile(model, backend=look, fullgraph=True, dynamic=False)(tokens[:, :-1], tokens[:, 1:])
    assert not seen


def aliases(graph):
    """Casts of a graph, and of the graphs in it, that return a tensor of the dtype they were given."""
    for part in (m for m in graph.modules() if isinstance(m, torch.fx.GraphModule)):
        for node in part.graph.nodes:
            if node.op == "call_method" and node.target in CASTS:
                before, after = (n.meta["example_value"] for n in (node.args[0], node))
                if before.dtype == after.dtype and before.device == after.device:
                    yield f"{node.name} in {node.meta.get('stack_trace', '')[-200:]}"


def test_the_search_for_aliases_finds_one():
    found = []

    def look(graph, _):
        found.extend(aliases(graph))
        return graph.forward

    torch.compile(lambda x: operator.add(x.to(x.dtype), 1), backend=look)(torch.ones(3))
    assert len(found) == 1


def test_evaluation_and_training_are_two_programs(monkeypatch):
    monkeypatch.setattr(
        torch, "compile", functools.partial(torch.compile, backend="eager")
    )  # Dynamo's part, in seconds
    check_programs("cpu")


@pytest.mark.campaign
@pytest.mark.parametrize("name", [n for n in MODELS if n not in ("pre_norm", "chunked loss")])
def test_every_model_has_two_programs(name):
    check_programs("cpu", MODELS[name])


@pytest.mark.campaign
def test_radii_of_two_models_do_not_meet():
    """√d and 1 in one process: numbers that torch 2.13 would otherwise turn into one variable, and fail."""
    losses = []
    for name in ("geonorm", "nGPT", "proj_sphere"):
        cfg = settings(*MODELS[name], "compile=true")
        model = GPT(gpt_config(cfg))
        losses.append(
            accumulate(
                compiled(model, cfg, torch.device("cpu")),
                windows(4),
                4,
                torch.device("cpu"),
                torch.autocast("cpu", enabled=False),
            )
        )
    assert all(loss.isfinite() for loss in losses)


def test_evaluation_of_an_odd_number_of_windows_is_exact():
    """The last batch counts by its windows, whether or not the others are compiled."""
    model, off = GPT(gpt_config(settings())), torch.autocast("cpu", enabled=False)
    tokens = torch.from_numpy(windows(7).astype("int64"))
    with torch.no_grad():
        each = [model(row[None, :-1], row[None, 1:])[1].item() for row in tokens]
    calls = []

    def counting(x, y):
        calls.append(len(x))
        return model(x, y)

    counting.eval, counting.train = model.eval, model.train
    found = mean_loss(counting, model, windows(7), 4, one_rank("cpu"), off)
    assert found == pytest.approx(sum(each) / 7, abs=1e-6) and calls == [4]


def test_a_smaller_last_part_counts_by_its_windows():
    off, found = torch.autocast("cpu", enabled=False), []
    for size in (3, 8):
        torch.manual_seed(0)
        model = GPT(gpt_config(settings()))
        loss = accumulate(model, windows(8), size, torch.device("cpu"), off)
        found.append([loss, *(p.grad for p in model.parameters())])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found))


def test_rows_of_logits_at_once(monkeypatch):
    """On the CPU as ever; on CUDA all where they fit and the head is compiled, otherwise chunks of 8,192."""
    cuda = torch.device("cuda", 0)
    assert loss_module.rows_at_once(64, 50304, torch.device("cpu")) == 64
    assert loss_module.rows_at_once(65536, 50304, torch.device("cpu")) == 667
    assert loss_module.rows_at_once(65536, 50304, cuda) == 8192
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for gib, rows in ((80, 65536), (40, 8192)):
        monkeypatch.setattr(loss_module, "_device_bytes", lambda index, gib=gib: gib * 2**30)
        assert loss_module.rows_at_once(65536, 50304, cuda) == rows


def test_memory_of_the_device_is_a_constant_of_a_program(monkeypatch):
    loss_module.mark_constants()
    properties = type("Properties", (), {"total_memory": 80 * 2**30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    half = torch.compile(lambda x: x * (loss_module._device_bytes(0) // 2**30), backend="eager", fullgraph=True)
    assert half(torch.ones(1)).item() == 80


def test_evaluation_computes_no_gradient_in_chunks(monkeypatch):
    """The chunks compute it with the loss, and float32 weights ask for one even where nobody does."""
    needed = []
    plain = loss_module._ChunkedCrossEntropy.forward

    def watching(ctx, *args):
        needed.append(any(ctx.needs_input_grad))
        return plain(ctx, *args)

    monkeypatch.setattr(loss_module._ChunkedCrossEntropy, "forward", staticmethod(watching))
    model, tokens = GPT(gpt_config(settings())), torch.from_numpy(windows(4).astype("int64"))
    with small_chunks(True):
        for enabled in (True, False):
            with torch.set_grad_enabled(enabled):
                model(tokens[:, :-1], tokens[:, 1:])
    assert needed == [True, False]


# ---- the checks of tests/cuda, on the CPU ----


@pytest.mark.parametrize(
    "model", [["assignment=hetero"], ["assignment=adamw", *MODELS["nGPT"]]], ids=["Hetero", "nGPT"]
)
def test_an_update_that_is_left_out_changes_nothing(model):
    check_no_sync(*model, device="cpu")


def test_matrices_stay_on_their_manifolds_under_autocast():
    check_manifolds_hold("assignment=hetero", "optim.muon.lr=0.05", device="cpu", steps=5)


@pytest.mark.campaign
@pytest.mark.parametrize("assignment", ["all_stiefel", "all_dgram", "hetero"])
def test_matrices_stay_on_their_manifolds_for_50_steps(assignment):
    check_manifolds_hold(f"assignment={assignment}", "optim.muon.lr=0.05", device="cpu")


def test_a_switch_for_low_precision_changes_no_update():
    check_no_low_precision_in_steps("assignment=hetero", device="cpu")


@pytest.mark.parametrize("assignment", ["all_stiefel", "all_dgram"])
def test_certificates_of_16_bit_products_are_those_of_32(assignment):
    check_certificates(f"assignment={assignment}", device="cpu", products=("float32", "float16"))


def test_a_step_is_a_function_of_its_gradients():
    check_step_equals_the_cpus("assignment=hetero", device="cpu", products=("float32", "float32"), tolerance=1e-12)


def test_a_step_of_16_bit_products_is_near_that_of_32():
    """Of all assignments, this one differs most: what the check allows on a GPU must be more."""
    check_step_equals_the_cpus("assignment=unconstrained", device="cpu", products=("float32", "float16"))


@pytest.mark.campaign
@pytest.mark.parametrize("compile", [False, True])
def test_two_ranks_on_one_device(tmp_path, compile):
    check_ranks(2, "assignment=hetero", f"compile={compile}".lower(), device="cpu", folder=tmp_path, tolerance=2e-2)


def test_a_torch_that_cannot_compile_the_step_is_refused(monkeypatch):
    """On CUDA alone, and only where the certified step of 16-bit products is compiled."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    refused = settings(device="cuda")
    assert problems_of_compiler(refused) == []
    monkeypatch.setattr(torch, "__version__", "2.9.0+cu128")
    with pytest.raises(
        ConfigError, match=r"1 problem.*\n.*install torch 2\.9\.1 or later, or use optim\.muon\.rule\.compile=false"
    ):
        check(refused)
    for switched in ("assignment=adamw", "optim.muon.rule.compile=false"):
        assert problems_of_compiler(settings(switched, device="cuda")) == []
    assert problems_of_compiler(replace(refused, device="cpu")) == []


def test_the_check_of_a_gpu_needs_no_optional_package():
    """Its modules and those of tests/cuda are imported where these packages are missing."""
    absent = ("wandb", "datasets", "tiktoken", "bokeh")
    modules = ("scripts.gpu_check", "scripts.gpu_runs", "scripts.bench", "data.prepare", "device_checks")
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); import {', '.join(modules)}"
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, check=True)
