"""What several ranks share, counted from shapes: the work and bytes of a step, and the memory of a rank.

`scripts/bench.py scaling` and `memory` run this module. The owner of every matrix and the messages are those of optim/ownership.py.
Times are predictions, at rates that others measured or vendors state; a measurement on devices is to judge them. With `measured=2,4`,
`memory` also trains a small model on so many CPU ranks, and measures what they hold and allocate.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.gpt import GPT
from optim.assignment import assign
from optim.manifolds import tall
from optim.ownership import choose_owners, members_of_buckets, plan_messages, step_flops
from optim.stack import StepRule, row_blocks
from scripts.command import UsageError, entries
from scripts.timing import NOT_MEASURED, Rows
from training.build import gpt_config, step_rule
from training.config import compose
from training.groups import muon_groups
from training.library import tensors_of

SIZES = ("gpt2_124m", "gpt2_350m", "gpt2_774m", "gpt2_1_5b")
RANKS = tuple(2**i for i in range(11))
PRODUCTS_PER_S = 650e12  # operations of 16-bit products, as in bench_counts.py
NODE = 8  # ranks
IN_NODE_PER_S, BETWEEN_NODES_PER_S = 450e9, 50e9  # bytes that a rank receives by NVLink 4, and at 400 Gbit/s
LARGE = ("gpt2_774m", "gpt2_1_5b")
SMALL = ["model.n_layer=6", "model.n_head=4", "model.n_embd=256", "model.block_size=16", "model.vocab_size=2048"]
GIB = 2**30
_MEASURED = "forward and backward "


@dataclass
class Shapes:
    """The parameters of a model under Hetero, without storage: ManifoldMuon's in groups, and AdamW's."""

    groups: list[dict[str, Any]]
    others: list[Tensor]
    layers: int
    rule: StepRule

    @classmethod
    def of(cls, overrides: Iterable[str]) -> Shapes:
        """The parameters of a configuration."""
        cfg = compose(["assignment=hetero", "optim.muon.rule.products=float16", *overrides])
        with torch.device("meta"):
            params = dict(GPT(gpt_config(cfg)).named_parameters())
        shapes = {name: tuple(p.shape) for name, p in params.items()}
        rows = assign(shapes, cfg.assignment.rules or {}, cfg.optim.always_adamw)
        shared = {key: getattr(cfg.optim.muon, key) for key in ("block_length", "row_beta")}
        groups = [
            {**shared, **group, "params": [params[name] for name in names]}
            for names, group in muon_groups(rows, cfg.optim.muon)
        ]
        others: list[Tensor] = [params[row.name] for row in rows if row.manifold is None]
        return cls(groups, others, cfg.model.n_layer, step_rule(cfg.optim))

    @property
    def matrices(self) -> list[Tensor]:
        """The matrices of ManifoldMuon."""
        return [p for group in self.groups for p in group["params"]]

    def owners(self, world: int) -> dict[Tensor, int]:
        """The owner of each matrix."""
        return choose_owners(self.groups, self.rule, world)

    def bucket_flops(self, owners: Mapping[Tensor, int], world: int) -> list[list[float]]:
        """For each rank, the operations in the products of each of its buckets."""
        return [
            [self._flops(group, params) for group, params in buckets]
            for buckets in members_of_buckets(self.groups, owners, world)
        ]

    def _flops(self, group: Mapping[str, Any], params: list[Tensor]) -> float:
        shape = tall(row_blocks(params[0], group["blocks"])).shape[-2:]
        return len(params) * group["blocks"] * float(step_flops(self.rule, *shape, group["manifold"]))


def numbers(tensors: Iterable[Tensor]) -> int:
    """How many numbers there are in all tensors."""
    return sum(p.numel() for p in tensors)


def numbers_owned(owners: Mapping[Tensor, int], world: int) -> list[int]:
    """How many numbers each rank owns."""
    found = [0] * world
    for p, owner in owners.items():
        found[owner] += p.numel()
    return found


# ---- the step ----


def scaling_rows(options: dict[str, Any]) -> Rows:
    """Operations of the heaviest rank, and the exchange of new weights (launcher.shard=ddp). AdamW and gradients are left out."""
    return [
        scaling_row(size, shapes, world)
        for size in SIZES
        for shapes in [Shapes.of([f"model={size}"])]
        for world in RANKS
    ]


def scaling_row(size: str, shapes: Shapes, world: int) -> dict[str, Any]:
    """One line: what is counted, then what is predicted. With `fsdp`, the step is the same; nothing is exchanged after it, but matrices are
    lent, and gradients summed, in every micro-batch.
    """
    owners = shapes.owners(world)
    work = shapes.bucket_flops(owners, world)
    load = [sum(flops) for flops in work]
    heaviest = work[load.index(max(load))]
    messages = [4 * sum(numbers(params) for _, params in sent) for sent in plan_messages(shapes.groups, owners, world)]
    own = [4 * n for n in numbers_owned(owners, world)]
    total = sum(messages)
    rate = IN_NODE_PER_S if world <= NODE else BETWEEN_NODES_PER_S
    computed = sent = 0.0
    for i, size_of in enumerate(messages if world > 1 else ()):
        computed += heaviest[i] / PRODUCTS_PER_S if i < len(heaviest) else 0.0
        sent = max(sent, computed) + size_of / rate  # one message after the other, while buckets are computed
    step = max(load) / PRODUCTS_PER_S
    row: dict[str, Any] = {
        "model": size,
        "ranks": world,
        "matrices": len(owners),
        "heaviest rank TFLOP": max(load) / 1e12,
    }
    row |= {"heaviest / mean": max(load) * world / sum(load), "ranks without a matrix": load.count(0.0)}
    row |= {"received MiB a rank": (total - min(own)) / 2**20 if world > 1 else 0.0}
    lent = (2 * 2 + 4) * numbers(shapes.matrices)  # in 16 bits for the forward and the backward pass; float32 gradients
    row |= {"fsdp: MiB a micro-batch": lent / 2**20 if world > 1 else 0.0}
    row |= {"sent before the last bucket": f"{1 - messages[-1] / total:.0%}" if world > 1 else "–"}
    row |= {"step ms, predicted": 1e3 * step, "exchange ms, predicted": 1e3 * total / rate if world > 1 else 0.0}
    return {**row, "both ms with overlap, predicted": 1e3 * max(step, sent)}


# ---- memory ----


def memory_rows(options: dict[str, Any]) -> Rows:
    """Memory of the rank that holds most, by launcher.shard. Activations and the temporaries of ManifoldMuon's products are left out.

    Raises:
        UsageError: the option `measured` is no list of numbers of ranks.
    """
    rows, worlds = [], ranks_of(options["measured"])
    for size in LARGE:
        shapes = Shapes.of([f"model={size}"])
        for world in (1, 2, 4, 8, 16, 64):
            for shard in ("ddp", "fsdp")[: 1 if world == 1 else 2]:
                parts = counted_memory(shapes, world, shard, product_bytes=2)
                rows.append(memory_row(size, world, shard, parts, {}))
    small = Shapes.of(["model=demo", *SMALL])
    for world in worlds:
        for shard in ("ddp", "fsdp"):
            parts = counted_memory(small, world, shard, product_bytes=4)
            rows.append(
                memory_row(f"{small.layers} layers, CPU ranks", world, shard, parts, measured_memory(world, shard))
            )
    return rows


def ranks_of(text: str) -> list[int]:
    """The numbers of ranks of a list with commas.

    Raises:
        UsageError: one is no whole number above 0.
    """
    if wrong := [word for word in entries(text) if not word.isdecimal() or int(word) < 1]:
        raise UsageError(f"measured={text}: {wrong[0]} is no number of ranks; give whole numbers, such as measured=2,4")
    return [int(word) for word in entries(text)]


def memory_row(
    size: str, world: int, shard: str, counted: Mapping[str, float], measured: Mapping[str, float]
) -> dict[str, Any]:
    """One line, in GiB."""
    row: dict[str, Any] = {"model": size, "ranks": world, "shard": shard}
    row |= {name: value / GIB for name, value in counted.items()}
    held = counted["weights"] + counted["gradients"] + counted["state"]
    sums = {"held": held, "forward and backward": held + counted["in passing"]}
    for name, value in sums.items():
        row |= {name: value / GIB, f"{name}, measured": measured[name] / GIB if measured else NOT_MEASURED}
    return {**row, "exchange": row.pop("exchange")}


def counted_memory(shapes: Shapes, world: int, shard: str, product_bytes: int) -> dict[str, float]:
    """Bytes of the largest rank. `product_bytes`: of a number in products, 2 with bfloat16 and 4 with float32.

    in passing (forward, backward), ddp: the buckets of DDP, as large as all gradients, and 16-bit copies of the matrices. fsdp: what AdamW
    updates outside of the blocks, and its gradient twice; two blocks' matrices as they are lent, and the gradients of three. Not all of it
    is there at once: it is a bound.
    exchange (step), ddp: the buckets of DDP and the new weights of all ranks.
    """
    held: float  # numbers of parameters on the rank
    split: float  # of them, AdamW's
    passing: float
    owners = shapes.owners(world)
    own = max(numbers_owned(owners, world))
    matrices, others = numbers(shapes.matrices), numbers(shapes.others)
    if shard == "ddp":
        copies = product_bytes * matrices if product_bytes < 4 else 0
        exchanged, buckets = (4 * matrices, 4 * (matrices + others)) if world > 1 else (0, 0)
        held, split = matrices + others, others
        passing, exchange = buckets + copies, buckets + exchanged
    else:
        held, split = own + others / world, others / world
        block = matrices / shapes.layers
        passing, exchange = 3 * 4 * others + 2 * product_bytes * block + 3 * 4 * block, 0
    bytes_of = {"weights": 4 * held, "gradients": 4 * held, "state": 4 * own + 8 * split}
    return {name: float(value) for name, value in {**bytes_of, "in passing": passing, "exchange": exchange}.items()}


# ---- measured on CPU ranks ----


def measured_memory(world: int, shard: str) -> dict[str, float]:
    """Bytes held after a backward pass, and the peak of it and its forward pass, of the rank with most; gloo ranks of this machine."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_measure, (world, shard, folder), nprocs=world)
        found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(world)]
    return {name: max(f[name] for f in found) for name in found[0]}


def _measure(rank: int, world: int, shard: str, folder: str) -> None:
    """One rank of `measured_memory`."""
    import torch.distributed as dist
    from torch.profiler import ProfilerActivity, profile, record_function

    from training.build import build
    from training.placement import place
    from training.ranks import Ranks, leave_group

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world)
    cfg = compose(["assignment=hetero", "model=demo", *SMALL, f"launcher.shard={shard}", "device=cpu", "compile=false"])
    ranks = Ranks(rank, world, torch.device("cpu"), 600.0, dist.group.WORLD)
    torch.manual_seed(0)
    x = torch.randint(cfg.model.vocab_size, (1, cfg.model.block_size))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model, optimizers = build(cfg)
        placement = place(model, optimizers, ranks, cfg)
        for step in range(2):  # AdamW makes its state in the first
            with record_function(f"{_MEASURED}{step}"):
                placement.replica(x, x)[1].backward()
            held = held_bytes(model, optimizers)
            optimizers.step()
            optimizers.zero_grad()
    found = {"held": held, "forward and backward": _peak_of(profiler)}
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    leave_group()


def held_bytes(model: torch.nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> int:
    """Bytes of the storages of this rank's weights, gradients and states."""
    tensors = tensors_of([*((p, p.grad) for p in model.parameters()), *(o.state for o in optimizers)])
    local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local}.values())


def _peak_of(profiler: Any) -> int:
    """The most bytes that were allocated at a time in the last forward and backward pass, of those allocated under the profiler."""
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    [last] = [e for e in events if e.name() == f"{_MEASURED}1"]
    now = most = 0
    for event in (e for e in events if e.name() == "[memory]"):
        now += event.nbytes()
        if last.start_ns() <= event.start_ns() <= last.start_ns() + last.duration_ns():
            most = max(most, now)
    return most
