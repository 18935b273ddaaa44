"""Refuse overrides of what an experiment decides for its cases.

An override comes last, so all cases would have it, whatever the table calls them.
"""

from __future__ import annotations

from scripts.analysis.runs import at
from scripts.analysis.study import Study
from scripts.command import key_of, refuse
from training.config import CONFIGS, compose_plain


def refuse_decided(study: Study) -> None:
    """Refuse the overrides of a study that its cases decide.

    Raises:
        UsageError: there is one. The message lists all. Or an axis with named values has no such value.
    """
    decided, problems = _decided(study), []
    for override in study.overrides:
        key = key_of(override)
        nearest = sorted(decided, key=lambda known: known != key)
        if known := next((k for k in nearest if _decides(study, k, key)), None):
            problems.append(f"{override} cannot be given here: {decided[known]}")
    refuse(problems)


def _decided(study: Study) -> dict[str, str]:
    """Key of train.py that the cases decide → what to do instead. A derived key is decided if it has several values."""
    found: dict[str, str] = {}
    derived: dict[str, set[str]] = {}
    cases, search = study.cases(), study.experiment.search
    for case in cases:
        for axis, value in case.items():
            why = f"the axis `{axis}` decides it; give {axis}="
            found |= {key_of(word): why for word in study.of_axis(axis, value)}
        for word in study.derived(case):
            derived.setdefault(key_of(word), set()).add(word)
        if search and (searched := study.searched(case)) in cases:
            found |= {axis.key: "the experiment searches it" for axis in search.axes(study, searched)}
    return {key: "the experiment computes it for each case" for key, own in derived.items() if len(own) > 1} | found


def _decides(study: Study, decided: str, key: str) -> bool:
    """Whether an override of a key changes what a decided key stands for.

    The choice of a group does not change a decided setting in it, as Hydra reads choices first. A setting in a decided group is decided if
    its choices differ in it.
    """
    if key == decided or (decided.startswith(f"{key}.") and not (CONFIGS / key).is_dir()):
        return True
    if not key.startswith(f"{decided}."):
        return False
    choices = {tuple(w for w in study.settings(case) if key_of(w) == decided) for case in study.cases()}
    values = [at(compose_plain([*study.experiment.base, *words]), key) for words in choices]
    return len({repr(value) for value in values if value is not None}) > 1
