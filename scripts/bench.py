"""What a step costs: measured ratios in one process, beside the operations counted from the shapes.

    python scripts/bench.py ceilings       what the device can do: copies, products, decompositions, attention kernels
    python scripts/bench.py optimizer      our step, the published step and AdamW at GPT-2 124M's shapes
    python scripts/bench.py lmo            how well, and how fast, the step and other methods solve recorded step problems
    python scripts/bench.py train          tokens/s, MFU, memory and the optimizer's share, by assignment
    python scripts/bench.py profile        the operations in which a step of each assignment spends its time
    python scripts/bench.py residual       a training step and its memory under every residual rule, as ratios to pre-norm
    python scripts/bench.py probes         a probe's share of training time at its interval in experiment=paper
    python scripts/bench.py scaling        work and bytes a rank, counted, for 1 to 64 ranks (nothing is timed)
    python scripts/bench.py counts         products, launches and bytes of one certified step at GPT-2 124M (nothing is timed)

Options (key=value): layers= and width= (optimizer, residual), repeats=, problems= (lmo), model=, micro_batch_size=, tokens=,
assignments= and optims= (lists; train and profile), limit_s= (train: no further turn after so many seconds), traces= (profile: a folder
for the traces), results= (a folder), file= (bench_<name>). Contestants alternate, medians are reported, and what was printed is kept as
JSON in results/<device>/. The same command serves CPU and CUDA.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from model.config import GPTConfig
from model.gpt import GPT
from scripts.command import UsageError, as_code, parse, run
from scripts.timing import device, device_folder, measure
from training.config import compose
from training.run import device_name, environment
from training.settings import CertifiedRule

ROOT = Path(__file__).resolve().parent.parent

Rows = list[dict[str, Any]]


# ---- optimizer ----


def matrices(layers: int, width: int, where: torch.device) -> GPT:
    """A GPT-2 of some width with hardly a vocabulary, and gradients in its matrices.

    The gradients decay over their singular directions as trained ones do; isotropic ones would be too easy.
    """
    model = GPT(GPTConfig(block_size=8, vocab_size=64, n_layer=layers, n_head=1, n_embd=width)).to(where)
    for p in model.parameters():
        if p.ndim == 2:
            p.grad = torch.randn_like(p) * torch.logspace(0, -3, p.size(1), device=where) * (1e-3 / p.size(0) ** 0.5)
    return model


SETTINGS = {
    "published (bfloat16)": ["optim=paper", "assignment=hetero"],
    "ours": ["optim=manifold_muon", "assignment=hetero"],
    "ours, high quality": ["optim=manifold_muon", "assignment=hetero", "optim.muon.rule.quality=high"],
    "ours, float32": ["optim=manifold_muon", "assignment=hetero", "optim.muon.rule.products=float32"],
    "plain Muon (unconstrained)": ["optim=manifold_muon", "assignment=unconstrained"],
}


def bench_optimizer(options: dict[str, Any]) -> Rows:
    """One step of Hetero over the matrices of GPT-2 124M; AdamW over the same matrices."""
    from optim.linalg import products_for
    from optim.manifold_muon import step_flops
    from training.build import build_optimizers

    where = device()
    layers, width = options["layers"] or (12 if where.type == "cuda" else 1), options["width"] or 768
    contestants: dict[str, Callable[[], object]] = {}
    flops: dict[str, float] = {}
    for name, overrides in SETTINGS.items():
        cfg = compose(overrides)
        rule = cfg.optim.muon.rule
        if isinstance(rule, CertifiedRule):  # named here, so that the operations are counted as this device does them
            rule = replace(rule, products=products_for(where, rule.products).precision)
            cfg = replace(cfg, optim=replace(cfg.optim, muon=replace(cfg.optim.muon, rule=rule)))
        muon = build_optimizers(matrices(layers, width, where), cfg).muon
        if muon is None:
            raise ValueError(f"{name} gives no matrix to ManifoldMuon; change its assignment in SETTINGS")
        contestants[name] = muon.step
        stepped = [(p, group["manifold"]) for group in muon.param_groups for p in group["params"]]
        counted = sum(step_flops(muon.rule, max(p.shape), min(p.shape), manifold) for p, manifold in stepped)
        flops[name] = counted
    blocks = matrices(layers, width, where).transformer.h
    mine = [p for block in blocks for p in block.parameters() if p.ndim == 2]
    contestants["AdamW (fused)"] = torch.optim.AdamW(mine, lr=1e-3, fused=True).step
    flops["AdamW (fused)"] = 16.0 * sum(p.numel() for p in mine)
    times = measure(contestants, options["repeats"] or 3)
    base = statistics.median(times["published (bfloat16)"])
    rows = []
    for name, seconds in times.items():
        median = statistics.median(seconds)
        rows.append(
            {
                "step": name,
                "layers": layers,
                "width": width,
                "counted GFLOP": flops[name] / 1e9,
                "median s": median,
                "GFLOP/s": flops[name] / median / 1e9,
            }
            | {"times faster than published": base / median, "all s": seconds}
        )
    if where.type == "cuda":
        check_no_sync(contestants)
    return rows


def check_no_sync(contestants: Mapping[str, Callable[[], object]]) -> None:
    """Run every contestant once where a host sync is an error; say which have one."""
    for name, call in contestants.items():
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
            print(f"{name}: no host sync in the step")
        except RuntimeError as error:
            print(f"{name}: host sync in the step ({error})")
        finally:
            torch.cuda.set_sync_debug_mode("default")


# ---- step problems ----


def bench_lmo(options: dict[str, Any]) -> Rows:
    """How good the step and every method of scripts/analysis/solvers.py are on given problems, by their certificate, and how long they take."""
    import numpy as np

    from optim.certificate import certify
    from optim.certified import direction
    from optim.linalg import PRECISIONS
    from optim.manifolds import MANIFOLDS
    from scripts.analysis.solvers import METHODS, Answer, solve

    path = Path(options["problems"] or ROOT / "tests" / "oracles" / "lmo_problems.npz")
    if not path.exists():
        raise UsageError(
            f"there are no problems in {path}; give problems=<file.npz> with keys <manifold>_<name>/W, /G, /optimum"
        )
    data, rows = np.load(path), []
    for key in sorted({k.rpartition("/")[0] for k in data.files}):
        W, G = (torch.from_numpy(data[f"{key}/{x}"]).float().to(device()) for x in "WG")
        manifold = key.partition("_")[0]
        W = MANIFOLDS[manifold].retract(W)  # the file is rounded to float16
        contestants: dict[tuple[str, int], Callable[[], torch.Tensor | Answer]] = {
            (f"step, {quality}, {precision}", 1): partial(direction, W, G, manifold, precision, quality)
            for quality in MANIFOLDS[manifold].efforts
            for precision in PRECISIONS
        }
        for method in METHODS:
            for calls in (1,) if method == "least_squares" else (1, 3, 6, 12, 24):
                contestants[method, calls] = partial(solve, W, G, manifold, method, calls)
        for (solver, calls), call in contestants.items():
            answer, seconds = call(), statistics.median(measure({"": call}, 3, warmup=0)[""])
            T = answer.T if isinstance(answer, Answer) else answer
            value = (T.double() * G.double()).sum().item() / float(data[f"{key}/optimum"])
            row = {"problem": key, "solver": solver, "calls": calls, "⟨G,A⟩/optimum": value}
            rows.append({**row, "certified feas": certify(W, G, T, manifold).feas.item(), "seconds": seconds})
    return rows


def calls_needed(rows: Rows) -> Rows:
    """Fewest calls and seconds at which each solver reached a quality on each problem."""
    found = []
    for problem, solver in dict.fromkeys((r["problem"], r["solver"]) for r in rows):
        mine = [r for r in rows if (r["problem"], r["solver"]) == (problem, solver)]
        row: dict[str, Any] = {"problem": problem, "solver": solver}
        for bar in (0.95, 0.99, 0.999):
            hit = next((r for r in mine if r["⟨G,A⟩/optimum"] >= bar), None)
            row[f"calls to {bar}"] = hit["calls"] if hit else "–"
            row[f"s to {bar}"] = hit["seconds"] if hit else "–"
        found.append(row)
    return found


# ---- in files of their own ----


def bench_ceilings(options: dict[str, Any]) -> Rows:
    """What the device can do; see scripts/bench_ceilings.py."""
    from scripts.bench_ceilings import measure

    return measure(options["repeats"] or 10)


def bench_train(options: dict[str, Any]) -> Rows:
    """Tokens a second and memory by assignment; see scripts/bench_train.py."""
    from scripts.bench_train import bench_train

    return bench_train(options)


def bench_profile(options: dict[str, Any]) -> Rows:
    """The operations a step spends its time in; see scripts/bench_train.py."""
    from scripts.bench_train import bench_profile

    return bench_profile(options)


def bench_probes(options: dict[str, Any]) -> Rows:
    """A probe beside training; see scripts/bench_train.py."""
    from scripts.bench_train import bench_probes

    return bench_probes(options)


def bench_residual(options: dict[str, Any]) -> Rows:
    """A training step under every residual rule, at GPT-2 124M's width; see scripts/bench_residual.py."""
    from scripts.bench_residual import measure

    chosen = {"layers": options["layers"], "width": options["width"], "micro": options["micro_batch_size"]}
    return measure({key: value for key, value in chosen.items() if value}, options["repeats"] or 7)


# ---- scaling, on paper ----


def bench_scaling(options: dict[str, Any]) -> Rows:
    """The heaviest rank's operations and the bytes each rank receives a step, by counting; the rest of the step is not included."""
    from optim.assignment import assign
    from optim.manifold_muon import share_out, step_flops
    from training.build import gpt_config, step_rule

    rows = []
    sizes = {"gpt2_124m": [], "gpt2_350m": [], "gpt2_774m": [], "1.5B": ["model=gpt2_774m", *WIDTH_1600]}
    for size, overrides in sizes.items():
        cfg = compose(["assignment=hetero", *(overrides or [f"model={size}"])])
        rule = step_rule(cfg.optim)
        with torch.device("meta"):
            shapes = {name: tuple(p.shape) for name, p in GPT(gpt_config(cfg)).named_parameters()}
        matrices = [row for row in assign(shapes, cfg.assignment.rules or {}, cfg.optim.always_adamw) if row.manifold]
        costs = [step_flops(rule, max(row.shape), min(row.shape), row.manifold) for row in matrices]
        numbers = [row.shape[0] * row.shape[1] for row in matrices]
        for world in (1, 2, 4, 8, 16, 32, 64):
            owners = share_out(costs, world)
            load = [sum(c for c, o in zip(costs, owners) if o == rank) for rank in range(world)]
            sent = [4 * sum(k for k, o in zip(numbers, owners) if o != rank) for rank in range(world)]
            rows.append(
                {"model": size, "ranks": world, "matrices": len(matrices), "heaviest rank TFLOP": max(load) / 1e12}
                | {"balance": sum(load) / world / max(load), "received MiB a rank": max(sent) / 2**20}
            )
    return rows


def bench_counts(options: dict[str, Any]) -> Rows:
    """What one certified step consists of; see scripts/bench_counts.py."""
    from scripts.bench_counts import measure

    return measure()


WIDTH_1600 = ["model.n_layer=48", "model.n_head=25", "model.n_embd=1600"]


# ---- output ----


def table(rows: Rows) -> str:
    """Rows as a Markdown table, which is also readable on a terminal; lists are left to the JSON."""
    columns = [c for c in rows[0] if not isinstance(rows[0][c], list)]
    cells = [[_format(row[c]) for c in columns] for row in rows]
    widths = [max(len(c), *(len(line[i]) for line in cells)) for i, c in enumerate(columns)]
    lines = [columns, ["-" * w for w in widths], *cells]
    return "\n".join("| " + " | ".join(x.ljust(w) for x, w in zip(line, widths)) + " |" for line in lines)


def _format(value: object) -> str:
    return (
        f"{value:.4g}"
        if isinstance(value, float) and abs(value) < 1e5
        else f"{value:,.0f}"
        if isinstance(value, float)
        else str(value)
    )


BENCHES = {
    "ceilings": bench_ceilings,
    "optimizer": bench_optimizer,
    "lmo": bench_lmo,
    "train": bench_train,
    "profile": bench_profile,
    "residual": bench_residual,
    "probes": bench_probes,
    "scaling": bench_scaling,
    "counts": bench_counts,
}


def work(arguments: list[str]) -> int:
    """The command; see the module's docstring."""
    defaults = {
        "layers": 0,
        "width": 0,
        "repeats": 0,
        "problems": "",
        "model": "",
        "micro_batch_size": 0,
        "tokens": 65536 if torch.cuda.is_available() else 4096,
        "assignments": "adamw,unconstrained,hetero",
        "optims": "manifold_muon",
        "limit_s": 0,
        "traces": "",
        "results": "",
        "file": "",
    }
    others, options = parse(arguments, defaults)
    if len(others) != 1 or others[0] not in BENCHES:
        raise UsageError(f"name one benchmark: {', '.join(BENCHES)}; then options such as repeats=5")
    [name] = others
    rows = BENCHES[name](options)
    print(table(rows))
    text = table(rows)
    if name == "lmo":
        text += "\n\n" + table(calls_needed(rows))
        print("\n" + table(calls_needed(rows)))
    folder = Path(
        options["results"] or ROOT / "results" / ("counted" if name in ("scaling", "counts") else device_folder())
    )
    folder.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python scripts/bench.py", *arguments])
    facts = {
        "command": command,
        "device": device_name(),
        "environment": environment(),
        "rows": rows,
    }
    file = options["file"] or f"bench_{name}"
    (folder / f"{file}.json").write_text(json.dumps(facts, indent=2) + "\n")
    (folder / f"{file}.md").write_text(
        f"{text}\n\nWritten by {as_code(command)} on {device_name()}, torch {torch.__version__}.\n"
    )
    print(f"\nwritten to {folder}: {file}.md, {file}.json")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    return run(work, arguments, __doc__)


if __name__ == "__main__":
    sys.exit(main())
