"""Learning-rate transfer: nGPT and νGPT over learning rates at several widths, depths and horizons; does the best rate stay?

    python scripts/lr_transfer.py                                            widths 128, 256, 512: one GPU, or hours on a CPU
    python scripts/lr_transfer.py widths=32,64,128 depths=2,4,8 steps=100,200,400 base=64,4,200 head=16 seeds=1     minutes on two cores

One of width, depth and number of steps is varied at a time, from the base. Options: widths=, depths=, steps=, rates=, seeds=: lists
with commas; base=: the width, depth and steps at which νGPT states its learning rate; head=: width of a head, the same everywhere;
workers=, output_dir=, results=. Anything else is an override of train.py for every run. Stop it and start it again: finished runs are kept.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.command import UsageError, as_code, parse, run
from scripts.grid import Job, exit_code, run_grid
from scripts.report import Table
from scripts.runs import read_run
from training.checks import check
from training.config import compose

ROOT = Path(__file__).resolve().parent.parent
TRANSFERS = {"none": "nGPT", "nu": "νGPT"}
OPTIONS = {
    "widths": "128,256,512",
    "depths": "2,4,8",
    "steps": "150,300,600",
    "rates": "0.0025,0.005,0.01,0.02,0.04,0.08",
    "seeds": "1",
    "base": "128,4,300",
    "head": 32,
    "workers": 2,
    "output_dir": "outputs/lr_transfer",
    "results": str(ROOT / "results" / "lr_transfer"),
}


@dataclass(frozen=True)
class Size:
    """What is varied: width of the stream, number of blocks, number of updates."""

    width: int
    depth: int
    steps: int


Sweeps = dict[str, list[Size]]
"""The sizes compared, in order, by what is varied."""

Losses = dict[tuple[str, Size], dict[float, list[float]]]
"""(transfer, size) → learning rate → final validation losses, one a seed; infinite where a run was unstable."""


def numbers(option: str, kind: type) -> list[Any]:
    """A list with commas, each entry of a kind."""
    try:
        return [kind(value) for value in option.split(",")]
    except ValueError:
        raise UsageError(f"'{option}' is not a list of numbers; separate them by commas, such as 128,256") from None


def sweeps_of(options: dict[str, Any]) -> tuple[Size, Sweeps]:
    """The base, and the sizes of each sweep."""
    base = numbers(options["base"], int)
    if len(base) != 3:
        raise UsageError(f"base={options['base']} must be width, depth and steps, such as base={OPTIONS['base']}")
    origin = Size(*base)
    lists = {"width": "widths", "depth": "depths", "steps": "steps"}
    return origin, {
        axis: [replace(origin, **{axis: value}) for value in sorted(numbers(options[name], int))]
        for axis, name in lists.items()
    }


def jobs_of(base: Size, sweeps: Sweeps, options: dict[str, Any], overrides: Sequence[str]) -> dict[tuple, Job]:
    """(transfer, size, rate, seed) → run; sizes that sweeps share are run once. Raises ConfigError before anything is written."""
    jobs = {}
    for transfer in TRANSFERS:
        for size in dict.fromkeys(size for sizes in sweeps.values() for size in sizes):
            heads, rest = divmod(size.width, options["head"])
            if rest or base.width % options["head"]:
                raise UsageError(
                    f"head={options['head']} divides not every width; choose a divisor of all widths and the base"
                )
            shape = (
                f"model.n_embd={size.width}",
                f"model.n_head={heads}",
                f"model.n_layer={size.depth}",
                f"max_steps={size.steps}",
            )
            origin = (
                f"transfer.base.n_embd={base.width}",
                f"transfer.base.n_head={base.width // options['head']}",
                f"transfer.base.n_layer={base.depth}",
                f"transfer.base_steps={base.steps}",
            )
            chosen = (
                "experiment=lr_transfer",
                f"transfer={transfer}",
                *shape,
                *(origin if transfer == "nu" else ()),
                *overrides,
            )
            check(compose(chosen))
            for rate in numbers(options["rates"], float):
                for seed in numbers(options["seeds"], int):
                    name = (
                        f"{transfer},width={size.width},depth={size.depth},steps={size.steps},lr={rate:g},seed={seed}"
                    )
                    settings = (*chosen, f"optim.adamw.lr={rate}", f"seed={seed}")
                    jobs[transfer, size, rate, seed] = Job(settings, Path(options["output_dir"]) / name)
    return jobs


def collect(jobs: dict[tuple, Job]) -> Losses:
    """What the finished runs reached."""
    losses: Losses = {}
    for (transfer, size, rate, _), job in jobs.items():
        if job.ended:
            r = read_run(job.directory)
            good = r.unstable_step is None and r.final is not None and math.isfinite(r.final)
            losses.setdefault((transfer, size), {}).setdefault(rate, []).append(r.final if good else math.inf)
    return losses


def optimum(curve: dict[float, list[float]]) -> tuple[float, float, bool]:
    """Learning rate and loss of the lowest mean, and whether it lies at an end of the rates.

    Between the rates by the parabola through the lowest point and its neighbours, in the logarithm of the rate.
    """
    rates = sorted(curve)
    means = [sum(curve[rate]) / len(curve[rate]) for rate in rates]
    i = min(range(len(rates)), key=means.__getitem__)
    if i in (0, len(rates) - 1) or not all(map(math.isfinite, means[i - 1 : i + 2])):
        return rates[i], means[i], True
    (x0, x1, x2), (y0, y1, y2) = (math.log(r) for r in rates[i - 1 : i + 2]), means[i - 1 : i + 2]
    left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    bend = (right - left) / (x2 - x0)
    if bend <= 0:
        return rates[i], means[i], False
    x = (x0 + x1) / 2 - left / (2 * bend)
    return math.exp(x), y1 + (x - x1) * (left + bend * (x - x0)), False


def table_of(losses: Losses, base: Size, sweeps: Sweeps) -> Table:
    """The best learning rate at every size, and how many octaves it lies from the base's."""
    lines = []
    for transfer, name in TRANSFERS.items():
        origin = optimum(losses[transfer, base])[0] if (transfer, base) in losses else None
        for axis, sizes in sweeps.items():
            for size in (s for s in sizes if (transfer, s) in losses):
                rate, loss, at_end = optimum(losses[transfer, size])
                moved = "" if origin is None else f"{math.log2(rate / origin):+.2f}"
                lines.append(
                    [
                        name,
                        axis,
                        str(getattr(size, axis)),
                        f"{rate:.4f}{' (end of the rates)' if at_end else ''}",
                        moved,
                        f"{loss:.4f}",
                    ]
                )
    headings = ["model", "varied", "to", "best rate", "octaves from the base's", "val loss there"]
    return Table(headings, lines, [False, False, True, True, True, True])


def draw(losses: Losses, sweeps: Sweeps, path: Path) -> None:
    """Final loss over learning rate: a row for each model, a column for what is varied, darker for larger; a dot at each optimum."""
    import matplotlib
    from matplotlib.figure import Figure

    from scripts.figures import STYLE, save

    rates = sorted({rate for curve in losses.values() for rate in curve})
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.2 * len(sweeps), 5.2), dpi=130, layout="constrained")
        panels = figure.subplots(len(TRANSFERS), len(sweeps), sharex=True, sharey="col", squeeze=False)
        for row, (transfer, name) in zip(panels, TRANSFERS.items()):
            for axes, (axis, sizes) in zip(row, sweeps.items()):
                shades = matplotlib.colormaps["viridis_r"](
                    [0.15 + 0.8 * i / max(1, len(sizes) - 1) for i in range(len(sizes))]
                )
                for size, shade in zip(sizes, shades):
                    curve = losses.get((transfer, size), {})
                    points = [
                        (rate, sum(v) / len(v)) for rate, v in sorted(curve.items()) if all(map(math.isfinite, v))
                    ]
                    if points:
                        axes.plot(*zip(*points), color=shade, linewidth=1.4, label=f"{getattr(size, axis)}")
                        axes.plot(*optimum(curve)[:2], marker="o", color=shade, markersize=5)
                axes.set_xscale("log")
                axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
                axes.minorticks_off()
                axes.set_title(f"{name}: {axis}", loc="left")
                axes.legend(frameon=False, fontsize=7)
        for axes in panels[-1]:
            axes.set_xlabel("learning rate stated")
        for row in panels:
            row[0].set_ylabel("validation loss (nats a token)")
        save(figure, path)


def work(arguments: list[str]) -> int:
    """The command; see the module's docstring."""
    overrides, options = parse(arguments, OPTIONS)
    base, sweeps = sweeps_of(options)
    jobs = jobs_of(base, sweeps, options, overrides)
    failures = run_grid(list(jobs.values()), options["workers"])
    losses = collect(jobs)
    if not losses:
        raise UsageError("no run came to its end, so there is no table; the lines above say why")
    results, table = Path(options["results"]), table_of(losses, base, sweeps)
    environment = next(read_run(job.directory).environment for job in jobs.values() if job.ended)
    command = shlex.join(["python", "scripts/lr_transfer.py", *arguments])
    results.mkdir(parents=True, exist_ok=True)
    footer = f"Written by {as_code(command)}. {environment.get('device')}, Python {environment.get('python')}, torch {environment.get('torch')}."
    (results / "table.md").write_text(f"{table.markdown()}\n\n{footer}\n")
    data = [
        {"model": TRANSFERS[transfer], "width, depth, steps": astuple(size), "losses by rate": curve}
        for (transfer, size), curve in losses.items()
    ]
    (results / "table.json").write_text(json.dumps(data, indent=2) + "\n")
    draw(losses, sweeps, results / "loss_by_rate.png")
    print(f"\n{table.text()}\n\n  written to {results}: table.md, table.json, loss_by_rate.png")
    return exit_code(failures)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    return run(work, arguments, __doc__)


if __name__ == "__main__":
    sys.exit(main())
