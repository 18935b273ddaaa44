"""What the commands share: `key=value` options, text that is safe in Markdown, and one message with exit code 2 for a mistake."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from training.overrides import top_names

ROOT = Path(__file__).resolve().parent.parent
"""The repository."""

_ALMOST = 0.75  # difflib's ratio of similar keys


class UsageError(Exception):
    """The command line is wrong. The message names the cause and the remedy."""


def parse(
    arguments: Sequence[str],
    defaults: Mapping[str, Any],
    problems_of: Callable[[list[str], dict[str, Any]], Iterable[str]] = lambda others, options: (),
    overrides: bool = False,
) -> tuple[list[str], dict[str, Any]]:
    """Split a command line into its other arguments and the options named in `defaults`, each of its default's type.

    The directories of a sweep have a `=` in their names. So an argument that does not begin with a known key is an other argument, unless
    the key is almost one of them, and no setting of train.py. problems_of: what else is wrong with the two, a line each; an option whose
    value is not of its type has its default there. overrides: whether the other arguments may be settings of train.py.

    Raises:
        UsageError: a key is misspelt, or a value is not of the option's type, or there are other problems. The message lists all.
    """
    others, options, problems = [], dict(defaults), []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in defaults:
            misspelt = _misspelt(argument, defaults, overrides) if equals else []
            problems += misspelt
            others += [] if misspelt else [argument]
            continue
        kind = type(defaults[key])
        if kind is bool:
            options[key] = value == "true"
            if value not in ("true", "false"):
                problems.append(f"{key}={value} must be true or false, such as {key}=true")
            continue
        try:
            options[key] = kind(value)
            if options[key] != options[key]:  # nan
                raise ValueError
        except ValueError:
            options[key] = defaults[key]
            what = "a whole number" if kind is int else "a number"
            problems.append(f"{key}={value} is not {what}; give one, such as {key}={defaults[key]}")
    refuse([*problems, *problems_of(others, options)])
    return others, options


def _misspelt(argument: str, defaults: Mapping[str, Any], overrides: bool) -> list[str]:
    """What is wrong with an argument `key=value` whose key is no option, if it is one that was misspelt or has dashes."""
    key, bare = argument.partition("=")[0], argument.lstrip("-")
    if bare != argument:
        name = bare.partition("=")[0].partition(".")[0]
        there = name in defaults or (overrides and (name in top_names() or name.startswith("hydra")))
        meant = f"write it without dashes: {bare}" if there else f"choose of {_as_options(defaults)}, without dashes"
        return [f"{argument} is no option; {meant}"]
    near = get_close_matches(key, list(defaults), 1, _ALMOST) if key.isidentifier() else []
    return [f"{key}= is no option; did you mean {name}=?" for name in near if key not in top_names()]


def _as_options(options: Iterable[str]) -> str:
    return ", ".join(f"{key}=" for key in options)


def problems_of_run(others: list[str], options: dict[str, Any]) -> list[str]:
    """What is wrong with the words besides the options, where they must be the directory of one run."""
    return problems_of_names(others, options, 1, f"name one run and, if you like, {_as_options(options)}; see --help")


def problems_of_options(others: Sequence[str], options: Mapping[str, Any]) -> list[str]:
    """A line for each of the other words that looks like an option and is no file."""
    wrong = [
        word for word in others if word.partition("=")[0].isidentifier() and "=" in word and not Path(word).exists()
    ]
    return [f"{word} is no option; choose of {_as_options(options)}" for word in wrong]


def problems_of_names(others: Sequence[str], options: Mapping[str, Any], count: int, remedy: str) -> list[str]:
    """What is wrong with the words besides the options, of which `count` must be there; `remedy` says which."""
    found = problems_of_options(others, options)
    return found if len(others) - len(found) == count else [*found, remedy]


def refuse(problems: Sequence[str]) -> None:
    """Raise UsageError with all problems, a line each, if there is one."""
    if problems:
        raise UsageError("\n".join(problems))


def without_effect(arguments: Iterable[str], reasons: Mapping[str, str]) -> list[str]:
    """A line for each argument that gives an option without effect here. reasons: the option → why it has none."""
    given = [(word, reasons.get(word.partition("=")[0])) for word in arguments if "=" in word]
    return [f"{word} has no effect: {why}; leave it out" for word, why in given if why is not None]


def entries(text: str) -> list[str]:
    """The entries of a list with commas, each once."""
    return list(dict.fromkeys(filter(None, text.split(","))))


def key_of(override: str) -> str:
    """The key of an override of train.py, such as "seed" of "++seed=3"."""
    return override.partition("=")[0].lstrip("+~")


def refuse_keys(overrides: Sequence[str], decided: Mapping[str, str]) -> None:
    """Refuse overrides of train.py whose key the command itself decides. `decided`: key → what to do instead.

    Raises:
        UsageError: there is one.
    """
    for override in overrides:
        if (key := key_of(override)) in decided:
            raise UsageError(f"{override} cannot be given here: {decided[key]}")


def as_cell(text: str) -> str:
    """Text as a cell of a Markdown table, escaped so that it does not end the cell or become HTML."""
    return " ".join(text.replace("|", "&#124;").replace("<", "&lt;").replace(">", "&gt;").split())


def as_code(text: str) -> str:
    """Text as code within a line of Markdown, with its backquotes replaced."""
    return "`" + " ".join(text.replace("`", "'").split()) + "`"


def command_line(script: str, *arguments: str) -> str:
    """What a person types to run a script of this folder."""
    return shlex.join(["python", f"scripts/{script}", *arguments])


def run(work: Callable[[list[str]], int], description: str, arguments: Sequence[str] | None = None) -> int:
    """Call `work` with the arguments (None: the process's own) and return its exit code.

    Prints `description` for --help. For an error that the user can correct it prints the message; the exit code is 2, or the error's own.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if "-h" in arguments or "--help" in arguments:
        before = signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--help | head` ends without a traceback
        print(description.strip(), flush=True)
        signal.signal(signal.SIGPIPE, before)
        return 0
    from training.checks import USER_ERRORS
    from training.overrides import REFUSALS
    from training.signals import Stopped

    try:
        return work(arguments)
    except (UsageError, *USER_ERRORS, *REFUSALS) as error:
        print(error, file=sys.stderr)
        return getattr(error, "exit_code", 2)
    except Stopped as stopped:
        print(stopped.message, file=sys.stderr)
        return 128 + stopped.signal
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
