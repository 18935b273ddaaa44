"""What a step costs: ratios measured in one process, and operations counted from the shapes.

    python scripts/bench.py ceilings       what the device can do: copies, products, decompositions, attention kernels
    python scripts/bench.py optimizer      our step, the published step and AdamW at GPT-2 124M's shapes
    python scripts/bench.py lmo            quality and time of the step and of other methods on recorded step problems
    python scripts/bench.py train          tokens/s, MFU, memory and the optimizer's share, by assignment
    python scripts/bench.py profile        the operations that take most of a step's time, by assignment
    python scripts/bench.py residual       time and memory of a training step under every residual rule, as ratios to pre-norm
    python scripts/bench.py probes         the share of training time that a probe takes in experiment=paper
    python scripts/bench.py scaling        work and bytes of a step for 1 to 1,024 ranks, counted (nothing is timed)
    python scripts/bench.py memory         memory of a rank with whole and with sharded models, counted
    python scripts/bench.py counts         products, launches and bytes of one certified step at GPT-2 124M (nothing is timed)
    python scripts/bench.py predicted      tokens/s of GPT-2 124M on one GPU: predictions beside bars and measurements (nothing is timed)

Options (key=value) and the benchmarks that take them; the others refuse them:

    results=, file=           all: a folder, and the name of the files in it (bench_<name>)
    repeats=                  ceilings, optimizer, train, residual, probes: how often a call is timed. profile: the steps of a trace
    layers=, width=           optimizer, residual
    micro_batch_size=         train, profile, residual, probes
    model=, tokens=           train, profile, probes: a model of configs/model, and the tokens of a step
    assignments=, optims=     train, profile: lists
    variants=                 train: a list of overrides, such as capture=true
    limit_s=                  optimizer, train, residual: seconds after which no further call is timed, but for the first of each; the exit code is
                              1 if a row is not measured
    problems=                 lmo: a file with step problems
    traces=                   profile: a folder for the traces
    measured=                 memory: a list of numbers of CPU ranks, on which a small model is measured

What is compared is timed by turns, and medians are reported. The table and a JSON file with every time are written to results/<device>/.
ceilings, optimizer, train, profile, residual and probes write what they have when SIGTERM stops them, with exit code 1; the others write
nothing then. Where a part of optimizer, train, profile, residual or probes fails, the rest is written, with exit code 1.
The same command works on a CPU and on CUDA.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.config import GPTConfig
from model.gpt import GPT
from optim.certificate import certify
from optim.certified import direction
from optim.linalg import PRECISIONS, products_for
from optim.manifolds import MANIFOLDS
from optim.ownership import step_flops
from scripts.analysis.solvers import METHODS, solve
from scripts.analysis.tables import Table, write_tables
from scripts.bench_ceilings import ceiling_rows
from scripts.bench_residual import residual_rows
from scripts.bench_scaling import memory_rows, scaling_rows
from scripts.bench_train import UNTRAINED, probe_rows, profile_rows, training_rows
from scripts.command import (
    ROOT,
    UsageError,
    as_code,
    command_line,
    parse,
    problems_of_names,
    refuse,
    run,
    without_effect,
)
from scripts.timing import (
    NOT_MEASURED,
    Rows,
    device,
    device_folder,
    failures,
    median,
    note_failure,
    seconds_of,
    steps_together,
    stoppable,
    take_turns,
)
from training.build import build_optimizers
from training.config import compose
from training.machine import device_name, environment
from training.overrides import hint
from training.settings import CertifiedRule
from training.signals import Stopped
from training.validate import problems_of_directory

COUNTED = ("scaling", "memory", "counts", "predicted")
"""The benchmarks that time nothing: their results depend on no device."""


# ---- optimizer ----


def matrices(layers: int, width: int, where: torch.device) -> GPT:
    """A GPT-2 of some width with a small vocabulary, and gradients in its matrices.

    The gradients decay over their singular directions as in training. Isotropic gradients would be too easy.
    """
    with where:
        model = GPT(GPTConfig(block_size=8, vocab_size=64, n_layer=layers, n_head=1, n_embd=width))
    for p in model.parameters():
        if p.ndim == 2:
            p.grad = torch.randn_like(p) * torch.logspace(0, -3, p.size(1), device=where) * (1e-3 / p.size(0) ** 0.5)
    return model


OPTIMIZER_SETTINGS = {
    "published (bfloat16)": ["optim=paper", "assignment=hetero", *UNTRAINED],
    "ours": ["assignment=hetero", *UNTRAINED],
    "plain Muon (unconstrained)": ["assignment=unconstrained", *UNTRAINED],
    "ours, high quality": ["assignment=hetero", "optim.muon.rule.quality=high", *UNTRAINED],
    "ours, float32": ["assignment=hetero", "optim.muon.rule.products=float32", *UNTRAINED],
}


def optimizer_rows(options: dict[str, Any]) -> Rows:
    """One step of Hetero over the matrices of GPT-2 124M; AdamW over the same matrices."""
    where = device()
    layers, width = options["layers"] or (12 if where.type == "cuda" else 1), options["width"] or 768
    blocks = matrices(layers, width, where).transformer.h
    mine = [p for block in blocks for p in block.parameters() if p.ndim == 2]
    adamw = "AdamW (fused)"
    steps: dict[str, Callable[[], object]] = {adamw: torch.optim.AdamW(mine, lr=1e-3, fused=True).step}
    flops = {adamw: 16.0 * sum(p.numel() for p in mine)}
    for name, overrides in OPTIMIZER_SETTINGS.items():
        cfg = compose(overrides)
        rule = cfg.optim.muon.rule
        if isinstance(rule, CertifiedRule):  # named here, so that the operations are counted as this device does them
            rule = replace(rule, products=products_for(where, rule.products).precision)
            cfg = replace(cfg, optim=replace(cfg.optim, muon=replace(cfg.optim.muon, rule=rule)))
        muon = build_optimizers(matrices(layers, width, where), cfg).muon
        if muon is None:
            raise ValueError(f"{name} gives no matrix to ManifoldMuon; change it in OPTIMIZER_SETTINGS")
        steps[name] = muon.step
        stepped = [(p, group["manifold"]) for group in muon.param_groups for p in group["params"]]
        flops[name] = sum(step_flops(muon.rule, max(p.shape), min(p.shape), manifold) for p, manifold in stepped)
    together = steps_together()
    times = take_turns(steps, options["repeats"] or 3, together, options["limit_s"], together=together)
    base = median(times["published (bfloat16)"])
    rows = []
    for name, seconds in times.items():
        row: dict[str, Any] = {"step": name, "layers": layers, "width": width}
        row |= {"counted GFLOP": flops[name] / 1e9}
        row |= {"median s": median(seconds), "GFLOP/s": NOT_MEASURED, "times faster than published": NOT_MEASURED}
        if seconds and isinstance(base, float):
            row["GFLOP/s"] = flops[name] / row["median s"] / 1e9
            row["times faster than published"] = base / row["median s"]
        rows.append({**row, "all s": seconds})
    if where.type == "cuda":
        with suppress(Stopped):
            check_no_sync({name: call for name, call in steps.items() if times[name]})
    return rows


def check_no_sync(steps: Mapping[str, Callable[[], object]]) -> None:
    """Make every call once while a host sync is an error; print which calls have one."""
    for name, call in steps.items():
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
            print(f"{name}: no host sync in the step")
        except Exception as error:
            if "synchronizing CUDA operation" in str(error):
                print(f"{name}: host sync in the step ({error})")
            else:
                note_failure(name)
        finally:
            torch.cuda.set_sync_debug_mode("default")


# ---- step problems ----


def lmo_rows(options: dict[str, Any]) -> Rows:
    """Quality, by the certificate, and time of the step and of every method of scripts/analysis/solvers.py on given problems."""
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
        solvers: dict[tuple[str, int], Callable[[], torch.Tensor]] = {
            (f"step, {quality}, {precision}", 1): partial(direction, W, G, manifold, precision, quality)
            for quality in MANIFOLDS[manifold].efforts
            for precision in PRECISIONS
        }
        for method in METHODS:
            for calls in {"least_squares": (1,), "slow_ascent": (24, 100)}.get(method, (1, 3, 6, 12, 24)):
                solvers[method, calls] = partial(solved, W, G, manifold, method, calls)
        solvers |= {("alternating", c): partial(solved, W, G, manifold, "alternating", c) for c in (3, 6, 12, 24)}
        if manifold == "stiefel":
            solvers["intrinsic", 1] = partial(solved, W, G, manifold, "intrinsic", 1)
        for (solver, calls), call in solvers.items():
            T, seconds = call(), statistics.median(seconds_of(call) for _ in range(3))
            value = (T.double() * G.double()).sum().item() / float(data[f"{key}/optimum"])
            row = {"problem": key, "solver": solver, "calls": calls, "⟨G,A⟩/optimum": value}
            rows.append({**row, "certified feas": certify(W, G, T, manifold).feas.item(), "seconds": seconds})
    return rows


def solved(W: torch.Tensor, G: torch.Tensor, manifold: str, method: str, calls: int) -> torch.Tensor:
    """The direction (m, n) that a method of scripts/analysis/solvers.py finds."""
    return solve(W, G, manifold, method, calls).T


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


# ---- counted, not timed ----


def count_rows(options: dict[str, Any]) -> Rows:
    """The operations, kernels and bytes of one certified step."""
    from scripts.bench_counts import counted_steps  # it alone needs the inner parts of torch.compile

    return counted_steps()


def prediction_rows(options: dict[str, Any]) -> Rows:
    """Tokens a second by assignment: predictions, bars, measurements."""
    from scripts.bench_predicted import predicted_rows  # for the same reason

    return predicted_rows()


# ---- output ----


def table_of(rows: Rows) -> Table:
    """Rows as a table. Lists are left to the JSON file."""
    headings = [key for key, value in rows[0].items() if not isinstance(value, list)]
    numeric = [any(isinstance(row[key], (int, float)) for row in rows) for key in headings]
    return Table(headings, [[_text(row[key]) for key in headings] for row in rows], numeric)


def _text(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4g}" if abs(value) < 1e5 else f"{value:,.0f}"


BENCHES: dict[str, Callable[[dict[str, Any]], Rows]] = {
    "ceilings": ceiling_rows,
    "optimizer": optimizer_rows,
    "lmo": lmo_rows,
    "train": training_rows,
    "profile": profile_rows,
    "residual": residual_rows,
    "probes": probe_rows,
    "scaling": scaling_rows,
    "memory": memory_rows,
    "counts": count_rows,
    "predicted": prediction_rows,
}
OPTIONS_OF: dict[str, tuple[str, ...]] = {
    "ceilings": ("repeats",),
    "optimizer": ("layers", "width", "repeats", "limit_s"),
    "lmo": ("problems",),
    "train": ("model", "micro_batch_size", "tokens", "assignments", "optims", "variants", "repeats", "limit_s"),
    "profile": ("model", "micro_batch_size", "tokens", "assignments", "optims", "repeats", "traces"),
    "residual": ("layers", "width", "micro_batch_size", "repeats", "limit_s"),
    "probes": ("model", "micro_batch_size", "tokens", "repeats"),
    "scaling": (),
    "memory": ("measured",),
    "counts": (),
    "predicted": (),
}
"""The options of every benchmark besides results= and file=, which all have."""


def options_of(arguments: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Read the command line: the name of the benchmark, and all options, of which `results` and `file` are complete.

    Raises:
        UsageError: there is no such benchmark, it does not take an option, a value is impossible, or the folder cannot be written to.
    """
    numbers = {"layers": 0, "width": 0, "repeats": 0, "micro_batch_size": 0, "limit_s": 0}
    numbers["tokens"] = 65536 if torch.cuda.is_available() else 4096
    texts = dict.fromkeys(("problems", "model", "traces", "measured", "results", "file"), "")
    lists = {"assignments": "adamw,unconstrained,hetero", "optims": "manifold_muon", "variants": ""}
    others, options = parse(arguments, {**numbers, **texts, **lists})
    remedy = f"name one benchmark: {', '.join(BENCHES)}; then options such as repeats=5"
    refuse(problems_of_names(others, options, 1, remedy))
    [name] = others
    if name not in BENCHES:
        raise UsageError(f"there is no benchmark '{name}'{hint(name, BENCHES)}")
    known = (*OPTIONS_OF[name], "results", "file")
    takes = f"{name} takes {', '.join(f'{key}=' for key in known)}"
    folder = Path(options["results"] or ROOT / "results" / ("counted" if name in COUNTED else device_folder()))
    options |= {"results": folder, "file": options["file"] or f"bench_{name}"}
    problems = without_effect(arguments, {key: takes for key in options if key not in known})
    problems += [f"{key}={options[key]} is below 0; give 0 or more" for key in numbers if options[key] < 0]
    if Path(options["file"]).name != options["file"]:
        problems.append(f"file={options['file']} must be a name without a folder; name the folder with results=")
    if options["traces"]:
        problems += problems_of_directory(Path(options["traces"]), "traces")
    refuse([*problems, *problems_of_directory(folder, "results")])
    return name, options


def work(arguments: list[str]) -> int:
    """Run a benchmark; print and write its table. Returns 1 if a row is not measured because the time was too short or because it failed.

    Raises:
        UsageError: the command line is wrong, or the table cannot be written. Stopped: a signal came before anything was measured.
    """
    name, options = options_of(arguments)
    failures.clear()
    with stoppable() as stopped:
        rows = BENCHES[name](options)
    if stopped and not rows:
        raise Stopped(stopped[0], "stopped before anything was measured")
    if failures:
        print(f"failed, see above: {', '.join(failures)}\n")
    if not rows:
        return 1
    tables = [table_of(rows), *([table_of(calls_needed(rows))] if name == "lmo" else [])]
    print("\n\n".join(table.text() for table in tables))
    command, folder, file = command_line("bench.py", *arguments), options["results"], options["file"]
    facts: dict[str, Any] = {"command": command, "device": device_name(), "environment": environment()}
    facts |= {"failed": [*failures], "rows": rows}
    foot = f"Written by {as_code(command)} on {device_name()}, torch {torch.__version__}."
    try:
        write_tables(folder, tables, foot, facts, file)
    except OSError as error:
        raise UsageError(
            f"{error.filename or folder} cannot be written ({error}), so only the text above is left; give another results="
        ) from error
    print(f"\nwritten to {folder}: {file}.md, {file}.json")
    too_short = options["limit_s"] and any(NOT_MEASURED in row.values() for row in rows)
    return 1 if stopped or too_short or failures else 0


main = partial(run, work, __doc__)

if __name__ == "__main__":
    sys.exit(main())
