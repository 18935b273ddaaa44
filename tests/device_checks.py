"""What must hold on every device: the tests of this folder check it on the CPU, those of tests/cuda on a GPU."""

import contextlib
import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from model import loss as loss_module
from model.gpt import GPT
from model.probes import probe
from model.residual import RESIDUAL_RULES
from optim.manifolds import MANIFOLDS
from training.build import build_optimizers, gpt_config
from training.capture import WARM_UP
from training.config import compose
from training.machine import compiled
from training.phases import Phases
from training.ranks import Ranks, leave_group
from training.step import FiniteGuard, accumulate, clip, mean_loss

SHAPE = ["model.n_layer=1", "model.n_head=2", "model.n_embd=32", "model.block_size=16", "model.vocab_size=64"]
# For 8,192 vectors of this width Inductor reduces over rows and columns in one kernel: it does so from 4,096 rows, twice as many rows as
# columns, and 5 · 2²⁰ numbers on (torch/_inductor/scheduler.py, MixOrderReduction.can_fuse, torch 2.13).
LARGE = ["model.n_layer=2", "model.n_head=12", "model.n_embd=768", "model.block_size=1024", "model.vocab_size=64"]
SWITCHES = ["qk_norm", "qk_clip", "soft_cap", "gated"]
MODELS = {
    **{rule: [f"residual={rule}"] for rule in RESIDUAL_RULES},
    "nGPT": ["model=ngpt_demo"],
    **{switch: [f"attention={switch}"] for switch in SWITCHES},
    "gated by position": ["attention=gated", "attention.head_gate=position"],
    "all switches": ["attention=gated", "attention.qk_norm=true", "attention.qk_clip=100", "attention.logit_cap=50"],
    "chunked loss": [],
    "stream in bfloat16": ["model.stream_dtype=bfloat16"],
    "GeoNorm in bfloat16": ["residual=geonorm", "model.stream_dtype=bfloat16"],
}
"""Overrides by name: every residual rule, nGPT, every switch of attention, the loss in chunks, and a stream of 16 bits."""


def settings(*overrides, device="cpu", shape=SHAPE):
    """The configuration of a small model on a device."""
    return compose([*overrides, *shape, f"device={torch.device(device).type}", "logger.mode=disabled"])


def windows(count=8, tokens=17, seed=0):
    """Random windows (count, tokens) uint16."""
    return np.random.default_rng(seed).integers(0, 64, (count, tokens)).astype("uint16")


def autocast_on(device, enabled=True):
    """bfloat16 products."""
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=enabled)


@contextlib.contextmanager
def small_chunks(active):
    """The loss in chunks of a few rows."""
    names = ("_FULL_LOGITS", "_CHUNK_LOGITS", "_CUDA_ROWS", "_SHARE")
    before = {name: getattr(loss_module, name) for name in names}
    if active:
        for name, value in zip(names, (0, 64 * 12, 12, 0)):
            setattr(loss_module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(loss_module, name, value)


# ---- compiled programs ----


def gradients(name, device, autocast, backend=None, dtype=torch.float32, attention=(None, torch.float32), large=False):
    """Loss and gradients of the named model, eagerly or compiled by a backend; weights and tokens are always the same."""
    torch._dynamo.reset()
    loss_module.mark_constants()
    torch.manual_seed(0)
    model = GPT(gpt_config(settings(*MODELS[name], shape=LARGE if large else SHAPE))).to(device)
    noise = 0.05 * (32 / model.config.n_embd) ** 0.5
    for p in model.parameters():  # away from the start, where some gradients vanish
        p.data.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())).to(device), alpha=noise)
    model.to(dtype)
    model.attend_by(*attention)
    tokens = torch.from_numpy((windows(8, 1025) if large else windows(4)).astype("int64")).to(device)
    replica = model if backend is None else torch.compile(model, backend=backend, dynamic=False, fullgraph=True)
    with small_chunks(name == "chunked loss"), autocast_on(device, autocast):
        loss = replica(tokens[:, :-1], tokens[:, 1:])[1]
        loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


def relative(a, b):
    """‖a - b‖ / ‖b‖."""
    return (torch.linalg.vector_norm((a - b).double()) / torch.linalg.vector_norm(b.double()).clamp_min(1e-30)).item()


def with_numbers_together(found):
    """The gradients by name, those of single numbers as one vector: terms of such a gradient cancel, and what is left is mostly rounding."""
    numbers = {name: g for name, g in found.items() if name != "loss" and g.numel() == 1}
    others = {name: g for name, g in found.items() if name not in numbers}
    return others | ({"numbers": torch.stack([g.flatten() for g in numbers.values()])} if numbers else {})


def check_compiled_gradients(name, device, autocast, backend, large=False):
    """Compiled gradients are as near to exact ones as eager ones are. Of a large model, single numbers have larger errors by chance."""
    exact = gradients(name, device, False, dtype=torch.float64, large=large)
    eager = gradients(name, device, autocast, large=large)
    ours = gradients(name, device, autocast, backend, large=large)
    assert ours.keys() == eager.keys() == exact.keys()
    more = 2e-4 if not autocast else 3e-2 if large else 5e-3
    ours, eager, exact = (with_numbers_together(found) for found in (ours, eager, exact))
    for key, g in ours.items():
        allowed = 2 * relative(eager[key], exact[key]) + more
        assert relative(g, exact[key]) < allowed, f"{key}: {relative(g, exact[key]):.2g}, allowed {allowed:.2g}"


def check_programs(device, overrides=()):
    """Evaluation, training, a probe and evaluation again are two programs, and stay two; an odd last batch makes no third."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    cfg = settings("compile=true", *overrides, device=device)
    model = GPT(gpt_config(cfg)).to(device)
    replica, ranks, autocast = compiled(model, cfg, torch.device(device)), one_rank(device), autocast_on(device)
    watched = torch.from_numpy(windows(2)[:, :-1].astype("int64")).to(device)
    for _ in range(3):
        mean_loss(replica, model, windows(7), 4, ranks, autocast)
        accumulate(replica, windows(8), 4, ranks.device, autocast)
        probe(model, watched)
        mean_loss(replica, model, windows(7), 4, ranks, autocast)
        assert counters["stats"]["unique_graphs"] == 2
        assert not counters["graph_break"]


def one_rank(device):
    """A world of one."""
    return Ranks(0, 1, torch.device(device), 60.0)


# ---- training steps ----


class Training:
    """What train.py does in a step, without anything around it."""

    def __init__(self, *overrides, device="cpu", autocast=True, wrap=None, rank=0, world=1):
        self.cfg = settings(*overrides, device=device)
        torch.manual_seed(0)
        self.device, self.rank, self.world = torch.device(device), rank, world
        self.model = GPT(gpt_config(self.cfg)).to(device)
        self.optimizers = build_optimizers(self.model, self.cfg, self.model.unit_vectors())
        self.replica = compiled(wrap(self.model) if wrap else self.model, self.cfg, self.device)
        self.params = dict(self.model.named_parameters())
        self.guard = FiniteGuard(list(self.params), self.device)
        self.autocast, self.step = autocast_on(device, autocast), 0

    def advance(self, poison=False):
        """One update; `poison` puts a NaN into the gradient, so that the update must be left out."""
        batch = windows(8, seed=self.step)[self.rank :: self.world]
        self.optimizers.set_lr(1.0 / (1 + self.step))
        loss = accumulate(self.replica, batch, 2, self.device, self.autocast)
        if poison:
            next(iter(self.params.values())).grad.mul_(torch.nan)
        norm, norms = clip([p.grad for p in self.params.values()], 1.0)
        self.step += 1
        skip = self.guard.check(self.step, loss, loss.clone(), norms)
        self.optimizers.step(skip=skip)
        self.model.clip_logits(skip)
        self.optimizers.zero_grad()
        return loss, norm

    def weights(self):
        """Copies, on the CPU."""
        return {name: p.detach().cpu().clone() for name, p in self.params.items()}


def check_no_sync(*overrides, device):
    """Neither an ordinary update nor one that is left out waits for the device."""
    run = Training("compile=auto", *overrides, device=device)
    for _ in range(3):
        run.advance()  # what is made once may wait
    before = run.weights()
    on_cuda = run.device.type == "cuda"
    if on_cuda:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        run.advance(poison=True)
        run.advance(poison=True)
    finally:
        if on_cuda:
            torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(w, before[name]) for name, w in run.weights().items())
    if on_cuda:
        torch.cuda.set_sync_debug_mode("error")
    try:
        run.advance()
    finally:
        if on_cuda:
            torch.cuda.set_sync_debug_mode("default")
    assert run.guard.count == 2 and any(not torch.equal(w, before[name]) for name, w in run.weights().items())


def check_manifolds_hold(*overrides, device, steps=50, largest=1e-4):
    """After many updates under autocast every matrix is where its manifold is."""
    run = Training(*overrides, device=device)
    for _ in range(steps):
        run.advance()
    constrained = [row for row in run.optimizers.rows if row.manifold]
    assert {row.manifold for row in constrained} == {*compose(overrides).assignment.rules.values()}
    for row in constrained:
        distance = MANIFOLDS[row.manifold].distance(run.params[row.name].detach()).item()
        assert distance < largest, f"{row.name} is {distance:.2g} from {row.manifold}"


LOW_PRECISION = {
    "word": lambda: torch.set_float32_matmul_precision("medium"),
    "matmul": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "everywhere": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
}
"""torch's process-wide settings that let float32 products be rounded."""
PLACES = [
    ("generic", "all"),
    *((backend, part) for backend in ("cuda", "mkldnn") for part in ("all", "matmul", "conv")),
]


def float32_precisions():
    """All that torch tells about the precision of float32, whatever was set before: "refused" where two settings disagree."""

    def told(read):
        try:
            return read()
        except RuntimeError:
            return "refused"

    matmul = torch.backends.cuda.matmul
    words = [told(torch.get_float32_matmul_precision), told(lambda: matmul.allow_tf32)]
    return words + [torch._C._get_fp32_precision_getter(*place) for place in PLACES]


@contextlib.contextmanager
def low_precision_products(lower):
    """One of LOW_PRECISION switched on; afterwards torch is as it starts."""
    lower()
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
        for place in (p for p in PLACES if p[1] != "conv"):
            torch._C._set_fp32_precision_setter(*place, "none")


def require_low_precision(device):
    """Skip the test if the switches change no product on this device, such as a processor without bfloat16."""
    W = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(device)
    product = W @ W
    with low_precision_products(LOW_PRECISION["word"]):
        if torch.equal(W @ W, product):
            pytest.skip("no product of float32 is rounded here")


def check_no_low_precision_in_steps(*overrides, device):
    """A process-wide switch for TF32 changes no update, and no update changes the switch."""
    require_low_precision(device)
    found = []
    for lower in (None, *LOW_PRECISION.values()):
        run = Training(*overrides, "compile=false", device=device, autocast=False)
        run.advance()  # gradients are the model's business; the updates that follow are made of the same ones
        generator = torch.Generator().manual_seed(1)
        for p in run.params.values():
            p.grad = torch.randn(p.shape, generator=generator).to(device)
        with low_precision_products(lower) if lower else contextlib.nullcontext():
            before = float32_precisions()
            run.optimizers.step()
            assert float32_precisions() == before
        found.append(run.weights())
    assert all(torch.equal(w, other[name]) for other in found[1:] for name, w in found[0].items())


def stepped(*overrides, device, products, watched=False):
    """Two trainings after an update by the same gradients: on the CPU and on a device, with products of these precisions."""
    for where, precision in zip(("cpu", device), products):
        run = Training(*overrides, f"optim.muon.rule.products={precision}", "compile=false", device=where)
        generator = torch.Generator().manual_seed(1)
        for p in run.params.values():
            p.grad = torch.randn(p.shape, generator=generator).to(where)
        run.optimizers.watch(watched)
        run.optimizers.step()
        yield run


def check_step_equals_the_cpus(*overrides, device, products, tolerance=3e-3):
    """The same gradients make the same update on a device as on the CPU; `products` are the precisions on the CPU and on the device.

    float32 sums of another order change the last bits of some float16 products, and so the weights by about 1e-3. float16 products instead
    of float32 ones change them by up to 1.5e-3 (`unconstrained`; both forms on the CPU), so both together by less than the tolerance.
    """
    cpu, other = (run.weights() for run in stepped(*overrides, device=device, products=products))
    for name, w in cpu.items():
        assert relative(other[name], w) < tolerance, name


def check_certificates(*overrides, device, products, tolerance=1e-2):
    """The same gradients have steps of the same certificates on a device as on the CPU, for products of the same precision."""
    runs = stepped(*overrides, device=device, products=products, watched=True)
    cpu, other = (dict(run.optimizers.certificates(lambda part: [part])) for run in runs)
    assert cpu.keys() == other.keys() and cpu
    for name, ours in other.items():
        for field in ("feas", "norm", "fallbacks"):
            assert abs(ours[field] - cpu[name][field]) < tolerance, f"{name}: {field}"
        assert ours["tangency"] < 5e-3, name


def check_captured(*overrides, device, record, tolerance=1e-3):
    """Updates that are replayed from a graph are those that are made as usual: refused ones, a watched one, a second round."""
    # At this rate no matrix asks for a second round by itself, so each graph is replayed.
    usual, captured = (Training(*overrides, "optim.muon.lr=0.005", device=device) for _ in range(2))
    captured.optimizers.capture(record)
    for step in range(WARM_UP + 6):
        for run in (usual, captured):
            if muon := run.optimizers.muon:
                muon.watched = step == WARM_UP + 1
                if step == WARM_UP + 3:
                    muon.buckets[0].state["level"].fill_(1.0)
                    muon.buckets[0].highest = None
            run.advance(poison=step == WARM_UP + 2)
    assert usual.guard.count == captured.guard.count == 1 and captured.optimizers.captured.graphs
    assert captured.optimizers.captured.made.total() <= WARM_UP + 2  # the others were replayed
    for name, w in usual.weights().items():
        assert relative(captured.weights()[name], w) < tolerance, name


def check_phases(device, seconds):
    """A phase is as long as the device is busy in it, and its length is known without a wait in between."""
    phase, work = Phases(torch.device(device)), torch.randn(4096, 4096, device=device)
    seconds(lambda: work @ work)  # the first product also loads the library
    for _ in range(3):
        with phase("outer"):
            work @ work
            with phase("inner"):
                for _ in range(20):
                    work @ work
    found, whole = phase.read(), seconds(lambda: [work @ work for _ in range(63)])
    assert 0.5 * whole < sum(found.values()) < 2 * whole and found["inner"] > 5 * found["outer"] > 0


# ---- several ranks on one device ----


def check_ranks(world, *overrides, device, folder, tolerance):
    """Weights after three steps on several ranks of one device, which talk over gloo: equal on all, and near those of one."""
    mp.spawn(_rank, args=(world, overrides, device, str(folder)), nprocs=world)
    found = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world)]
    alone = Training(*overrides, device=device)
    for _ in range(3):
        alone.advance()
    for name, w in alone.weights().items():
        assert all(torch.equal(other[name], found[0][name]) for other in found)
        assert relative(found[0][name], w) < tolerance, name


def _rank(rank, world, overrides, device, folder):
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    run = Training(*overrides, device=device, wrap=DistributedDataParallel, rank=rank, world=world)
    for _ in range(3):
        run.advance()
    torch.save(run.weights(), f"{folder}/rank{rank}.pt")
    leave_group()
