"""What only a GPU can show. Without one everything here is skipped; the same checks run on the CPU in tests/test_compiled.py.

What says most comes first, since a limit of time may end the tests; the compilations of whole models come last."""

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from device_checks import (
    MODELS,
    check_captured,
    check_certificates,
    check_compiled_gradients,
    check_manifolds_hold,
    check_no_low_precision_in_steps,
    check_no_sync,
    check_phases,
    check_programs,
    check_ranks,
    check_step_equals_the_cpus,
    gradients,
    relative,
)

from model.spectra import Spectra
from optim.certified import step
from optim.linalg import Products
from optim.manifolds import MANIFOLDS
from scripts.timing import seconds_of
from train import Run, train
from training.attention import MEASURED, measured, refusal
from training.capture import CudaGraphs
from training.config import compose
from training.log import read_records
from training.step import host_tokens

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")

ASSIGNMENTS = ["adamw", "unconstrained", "all_stiefel", "all_dgram", "hetero"]
RULES = ["manifold_muon", "paper"]


@pytest.mark.parametrize("assignment", ["all_stiefel", "all_dgram", "hetero"])
def test_matrices_stay_on_their_manifolds_for_50_steps(assignment):
    check_manifolds_hold(f"assignment={assignment}", "optim.muon.lr=0.05", device="cuda")


@pytest.mark.parametrize("on_cpu", ["float16", "float32"])
@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_a_step_equals_that_of_the_cpu(assignment, on_cpu):
    """float16 products, which the CPU emulates, beside its own and beside float32 ones."""
    check_step_equals_the_cpus(f"assignment={assignment}", device="cuda", products=(on_cpu, "float16"))


@pytest.mark.parametrize("manifold", ["stiefel", "dgram"])
def test_a_step_can_be_captured_in_a_graph(manifold):
    """Captured once, replayed with other gradients, another learning rate, another level and a skip: what the eager step does."""
    M = MANIFOLDS[manifold]
    W, G = M.retract(torch.randn(4, 512, 128, device="cuda")), torch.randn(4, 512, 128, device="cuda")
    eta, skip, level = (
        torch.tensor(0.02, device="cuda"),
        torch.tensor(False, device="cuda"),
        torch.zeros(4, device="cuda"),
    )

    def once():
        return step(W, G, eta, level, skip, M, M.efforts["default"], Products("float16"), highest=1, decay=0.1)

    stream = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(3):
            once()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        captured = once()
    G.copy_(torch.randn_like(G))
    eta.fill_(0.01)
    level[1] = 1
    graph.replay()
    with torch.no_grad():
        torch.testing.assert_close(captured.W, once().W, rtol=0, atol=1e-5)
    skip.fill_(True)
    graph.replay()
    assert torch.equal(captured.W, W)


def test_a_whole_run_with_all_options(tiny, tmp_path, monkeypatch):
    """A graph, an average, a trace, spectra from a thread: the records of a run without them, to the rounding of bfloat16.

    No step waits for the device, from the one on in which everything is compiled and recorded.
    """
    make_step = Run.make_step

    def strict(run, *args):
        assert run.step < 4 or run.optimizers.captured is None or run.optimizers.captured.graphs
        torch.cuda.set_sync_debug_mode("error" if run.step >= 4 else "default")
        try:
            return make_step(run, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Run, "make_step", strict)
    common = [o for o in tiny if not o.startswith(("output_dir=", "device="))]
    # At this rate no matrix asks for a second round, whose graph would be recorded later.
    common += ["device=cuda", "log.interval_certificate=null", "optim.muon.lr=0.002"]
    options = ["capture=true", "average=ema", "profile=2"]
    for name, extra in (("plain", []), ("all", options)):
        train(compose([*common, *extra, f"output_dir={tmp_path}/{name}"]))
    plain, found = (list(read_records(tmp_path / name)) for name in ("plain", "all"))
    for kind in ("train", "eval"):
        a, b = ([r["loss"] for r in records if r["kind"] == kind] for records in (plain, found))
        assert a == pytest.approx(b, abs=1e-2)
    for records in (plain, found):
        spectra = [r for r in records if r["kind"] == "spectra"]
        assert {r["step"] for r in spectra} == {0, 10, 20} and len({(r["step"], r["name"]) for r in spectra}) == 12
        last = [r for r in records if r["kind"] == "train"][-1]
        assert {"data", "forward_backward", "optimizer"} <= set(last["time"]) and last["peak_device_bytes"] > 0
    assert (tmp_path / "all/profile/trace.json.gz").exists()
    assert "forward_backward" in (tmp_path / "all/profile/table.txt").read_text()


@pytest.mark.parametrize("compile", ["false", "true"])
@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_captured_updates_are_the_usual_ones(assignment, compile):
    record = CudaGraphs(torch.device("cuda"))
    check_captured(f"assignment={assignment}", f"compile={compile}", device="cuda", record=record)


@pytest.mark.alone
def test_phases_are_timed_by_the_device():
    check_phases("cuda", seconds_of)


@pytest.mark.parametrize("optim", RULES)
@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_a_step_does_not_wait_for_the_device(assignment, optim):
    """But for the published retraction of DGram: torch's eigenvalue solver lets the host wait."""
    without = ["optim.muon.rule.retraction=manifold"] if optim == "paper" else []
    check_no_sync(f"assignment={assignment}", f"optim={optim}", *without, device="cuda")


@pytest.mark.parametrize("name", ["pre_norm", "geonorm", "nGPT"])
def test_no_program_is_compiled_twice(name):
    check_programs("cuda", MODELS[name])


def test_a_resumed_run_agrees_with_an_undisturbed_one(tiny, tmp_path):
    """Not to the bit as on the CPU: atomic additions come in any order. Losses agree to 1e-2 after ten more steps."""
    common = [o for o in tiny if not o.startswith(("output_dir=", "device="))] + ["device=cuda"]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    train(compose([*common, f"output_dir={straight}"]))
    halfway = compose([*common, f"output_dir={stopped}"])
    train(replace(halfway, max_steps=10, schedule=replace(halfway.schedule, decay_steps=20)))
    train(compose([*common, f"output_dir={stopped}", "resume=auto"]))
    for kind in ("train", "eval"):
        a, b = ([r["loss"] for r in read_records(d, kind)] for d in (straight, stopped))
        assert a == pytest.approx(b, abs=1e-2)


@pytest.mark.parametrize("compile", ["false", "true"])
def test_two_ranks_on_one_device_agree_with_one(tmp_path, compile):
    """Within the rounding of bfloat16 products, which batches of another size change."""
    options = ("assignment=hetero", f"compile={compile}")
    check_ranks(2, *options, device="cuda", folder=tmp_path, tolerance=2e-2)


@pytest.mark.parametrize("name", ["nGPT", "all switches"])
def test_a_step_of_other_models_does_not_wait_either(name):
    check_no_sync("assignment=adamw", *MODELS[name], device="cuda")


@pytest.mark.parametrize("backend", MEASURED)
def test_a_backend_of_attention_computes_what_torch_computes(backend):
    """Compiled, within the rounding of bfloat16."""
    if why := refusal(backend, (4, 16, 2, 16), torch.bfloat16, 0.0, torch.device("cuda")):
        pytest.skip(f"{backend} does not accept so small a model: {why}")
    plain, chosen = (
        gradients("pre_norm", "cuda", True, backend="inductor", attention=(a, torch.bfloat16)) for a in (None, backend)
    )
    assert all(relative(chosen[name], g) < 3e-2 for name, g in plain.items())


@pytest.mark.alone
def test_the_fastest_backend_of_attention_is_found_in_two_seconds():
    asked = ((16, 1024, 12, 64), torch.bfloat16, 0.0, torch.device("cuda"))
    for backend in MEASURED:
        refusal(backend, *asked)  # loads its library
    start = time.perf_counter()
    found = measured(*asked)
    assert time.perf_counter() - start < 2
    times = [s for s in found.seconds.values() if s is not None]
    assert found.seconds[found.backend] == min(times) > 0 and found.record()["message"].startswith("attention by")


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_a_switch_for_tf32_changes_no_update(assignment):
    check_no_low_precision_in_steps(f"assignment={assignment}", device="cuda")


def test_a_spectrum_equals_that_of_an_svd_on_the_cpu():
    torch.manual_seed(0)
    W = torch.randn(96, 64)
    both = (Spectra({"W": (w, MANIFOLDS["stiefel"].distance, 1)}) for w in (W.cuda(), W))
    found, expected = (record for spectra in both for _, record in spectra.records())
    assert found["sigma"] == pytest.approx(torch.linalg.svdvals(W.double()).tolist(), rel=6e-6)  # six digits
    assert found["distance"] == pytest.approx(expected["distance"], rel=1e-4)


def test_the_peak_of_a_run_is_its_own(tiny, tmp_path):
    """A run does not report the memory of what the same process did before it."""
    before = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    del before
    common = [o for o in tiny if not o.startswith(("output_dir=", "device="))]
    train(compose([*common, "device=cuda", f"output_dir={tmp_path}/run", "max_steps=2", "schedule.warmup_steps=1"]))
    [end] = read_records(tmp_path / "run", "end")
    assert 0 < end["peak_device_bytes"] < 2**29


@pytest.mark.parametrize("assignment", ["all_stiefel", "all_dgram", "hetero"])
def test_certificates_are_those_of_the_cpu(assignment):
    """float16 products, which the CPU emulates."""
    check_certificates(f"assignment={assignment}", device="cuda", products=("float16", "float16"))


def test_a_batch_is_pinned():
    assert host_tokens(np.zeros((2, 3), np.uint16), torch.device("cuda")).is_pinned()


def test_spectra_of_later_weights_do_not_reach_earlier_records():
    """The weights change at once; what was asked for is what they were."""
    W = torch.randn(8, 300, 200, device="cuda")
    expected = Spectra({str(i): (w, None, 1) for i, w in enumerate(W.cpu())})
    found = Spectra({str(i): (w, None, 1) for i, w in enumerate(W)})
    W.zero_()
    for (_, ours), (_, theirs) in zip(found.records(), expected.records()):
        assert ours["sigma"] == pytest.approx(theirs["sigma"], rel=2e-5) and found.done  # two roundings to six digits


@pytest.mark.parametrize("name", ["pre_norm", "geonorm", "nGPT"])
def test_compiled_gradients_equal_eager_ones_at_real_width(name):
    """Where the compiler chooses other kernels than for a small model."""
    check_compiled_gradients(name, "cuda", autocast=True, backend="inductor", large=True)


@pytest.mark.parametrize("name", MODELS)
def test_compiled_gradients_equal_eager_ones(name):
    check_compiled_gradients(name, "cuda", autocast=True, backend="inductor")
