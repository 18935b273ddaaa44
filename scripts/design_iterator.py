"""Design an iteration for the matrix sign: odd quintics p(x) = a·x + b·x³ + c·x⁵, one after the other, applied to singular values.

    python scripts/design_iterator.py l=0.1 r=0.1                      the steepest quintic with fixed points 0, ±(1-l), ±(1+r), five times
    python scripts/design_iterator.py interval=0.001,1 steps=6         the composition of six that is nearest to 1 on [0.001, 1]
    python scripts/design_iterator.py name=cans safety=1.01            a published list, here widened against rounding

Prints the coefficients, the slope of the composed map at 0, its band (least and largest value) on the interval, and an override of train.py.
Options: steps=5; interval=0.001,1 is also where the band is measured; cushion=0: no interval is taken to begin below this share of its upper
end (published for Polar Express: 0.024); safety=1 widens each interval by this factor; digits=6: the coefficients are rounded to so
many decimals, and the band is that of the rounded ones; figure=outputs/iterator.png. Only interval= alone takes a cushion; name= takes no steps.
The maths, with sources: optim/iterators.py.
"""

from __future__ import annotations

import math
import sys
from functools import partial
from pathlib import Path

import torch

from optim.iterators import (
    LOWER,
    Iteration,
    IteratorError,
    Quintic,
    band,
    iterator,
    peak_and_trough,
    polar_express_coefficients,
    slope_at_zero,
    steepest,
    unsound,
    widened,
)
from scripts.analysis.iterator_figures import draw_iterator
from scripts.command import UsageError, parse, refuse, run, without_effect

DEFAULTS = {
    "l": "",
    "r": "",
    "interval": "",
    "name": "",
    "steps": 5,
    "cushion": 0.0,
    "safety": 1.0,
    "digits": 6,
    "figure": "outputs/iterator.png",
}


def number(key: str, text: str) -> float:
    """A number of the command line.

    Raises:
        UsageError: it is none.
    """
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"{key}={text} is not a number; give one, such as {key}=0.1") from None


def interval_of(text: str) -> tuple[float, float]:
    """The two ends of `interval=lower,upper`; [LOWER, 1] if there is no text.

    Raises:
        UsageError: they are not two numbers with 0 < lower < upper.
    """
    if not text:
        return LOWER, 1.0
    ends = [number("interval", part) for part in text.split(",")]
    if len(ends) != 2 or not 0 < ends[0] < ends[1] < float("inf"):
        raise UsageError(
            f"interval={text} is no interval; give two numbers above 0, the smaller first: interval=0.001,1"
        )
    return ends[0], ends[1]


def l_and_r(options: dict) -> tuple[float, float] | None:
    """l and r of the options; None if they name neither.

    Raises:
        UsageError: one of the two is missing, or is not a number.
    """
    if not (options["l"] or options["r"]):
        return None
    if not (options["l"] and options["r"]):
        raise UsageError("l= and r= belong together, for the fixed points 1-l and 1+r; give both")
    return number("l", options["l"]), number("r", options["r"])


def reasons_of(options: dict) -> dict[str, str]:
    """Option → why it has no effect beside the others, for those that have none."""
    if options["name"]:
        return {"steps": "a named list has its own steps", "cushion": "a named list is not computed"}
    if options["l"] or options["r"]:
        return {"cushion": "with l= and r=, no interval is taken"}
    return {}


def design(options: dict) -> tuple[list[Quintic], str]:
    """The coefficients that the options ask for, and what they are, in words.

    Raises:
        UsageError: options that contradict each other. IteratorError: there is no such iteration.
    """
    lower, upper = interval_of(options["interval"])
    if not (options["steps"] >= 1 and 1 <= options["safety"] < 2 and 0 <= options["cushion"] < 1):
        raise UsageError("give steps of at least 1, safety from 1 to below 2 and a cushion from 0 to below 1")
    if not 1 <= options["digits"] <= 15:
        raise UsageError(f"digits={options['digits']} is no number of decimals; give 1 to 15")
    if options["name"]:
        if options["l"] or options["r"]:
            raise UsageError("name= and l=, r= are two ways to a list; give one of them")
        known = iterator(options["name"])
        return list(widened(known.coefficients, options["safety"])), options["name"]
    if chosen := l_and_r(options):
        l, r = chosen
        quintics = widened([steepest(l, r)] * options["steps"], options["safety"])
        return list(quintics), f"fixed points {1 - l:g} and {1 + r:g}, as steep as they allow"
    found = polar_express_coefficients(options["steps"], lower, upper, options["cushion"], options["safety"])
    return list(found), f"nearest to 1 on [{lower:g}, {upper:g}]"


def describe(coefficients: list[Quintic], lower: float, upper: float, chosen: tuple[float, float] | None = None) -> str:
    """What a person wants to know of a list: slope, band, what rounding does to it.

    chosen: l and r of one repeated quintic. Its trough is then the least value on [1-l, 1+r]; without them, that at its local minimum, which
    may lie before 1-l.
    """
    low, high = band(coefficients, lower, upper)
    lines = [
        f"slope at 0   {slope_at_zero(coefficients):.6g}",
        f"band         [{low:.5g}, {high:.5g}] on [{lower:g}, {upper:g}]",
    ]
    if len(set(coefficients)) == 1 and (turns := peak_and_trough(coefficients[0])):
        trough = band(coefficients[:1], 1 - chosen[0], 1 + chosen[1])[0] if chosen else turns[1]
        lines.append(f"one step     gamma {coefficients[0][2]:.6g}, peak {turns[0]:.5g}, trough {trough:.5g}")
    if reason := unsound(coefficients):
        return "\n".join([*lines, f"not usable   {reason}"])
    for dtype in (torch.bfloat16, torch.float16):
        try:
            Iteration(tuple(coefficients), (low, high)).require(dtype)
        except IteratorError as error:
            lines.append(f"rounding     {error}")
            break
    return "\n".join(lines)


def work(arguments: list[str]) -> int:
    """Design, print and draw."""
    others, options = parse(arguments, DEFAULTS)
    if others or not any(options[key] for key in ("l", "r", "interval", "name")):
        raise UsageError(
            f"{f'{others[0]} is no option' if others else 'nothing is asked for'}; give l= and r=, interval= or name=; see --help"
        )
    refuse(without_effect(arguments, reasons_of(options)))
    try:
        exact, what = design(options)
    except IteratorError as error:
        raise UsageError(str(error)) from error
    digits = options["digits"]
    coefficients = [(round(a, digits), round(b, digits), round(c, digits)) for a, b, c in exact]
    lower, upper = interval_of(options["interval"])
    if not all(map(math.isfinite, band(coefficients, lower, upper))):
        raise UsageError(
            f"this list diverges on [{lower:g}, {upper:g}]; give an interval that ends at 1, where the largest singular values are, or more digits"
        )
    print(f"{what}: {len(coefficients)} steps")
    for a, b, c in coefficients if len(set(coefficients)) > 1 else coefficients[:1]:
        print(f"  a {a:<12g} b {b:<12g} c {c:g}")
    print(describe(coefficients, lower, upper, l_and_r(options)))
    if unsound(coefficients):
        raise UsageError("train.py would refuse this list; give more digits, or another interval, l or r")
    print(f"override     'optim.muon.rule.iterator={[list(q) for q in coefficients]}'")
    path = Path(options["figure"])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_iterator(coefficients, lower, upper, what, path)
    except (OSError, ValueError) as error:  # ValueError: an ending that names no kind of picture
        raise UsageError(f"figure={path} cannot be written ({error}); name another file") from error
    print(f"written: {path}")
    return 0


main = partial(run, work, __doc__)

if __name__ == "__main__":
    sys.exit(main())
