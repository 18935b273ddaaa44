"""The verdict in words: which setting leads, by how much, how sure that is, and what went wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean

from scripts.analysis.runs import RecordedRun, text_at
from scripts.analysis.statistics import (
    Difference,
    Estimate,
    detectable,
    holm,
    scatter_allowed,
    seeds_needed,
    stopping_step,
)
from scripts.analysis.tables import Table, known_columns

SAME = {
    "data.name": "the data",
    "data.tokenizer": "the tokenizer",
    "model.block_size": "the context",
    "max_steps": "the number of steps",
    "global_batch_tokens": "the tokens of a step",
    "eval_windows": "the validation windows",
}
"""Settings that change what a loss means, or what it costs, and their names in a sentence."""
TRACK = {"global_batch_tokens": "524288", "eval_windows": "10240", "data.source": "bin"}
"""What the runs of the public optimizer track have in common (configs/experiment/speedrun_track3.yaml)."""


@dataclass(frozen=True)
class Setting:
    """Runs that differ only in the seed, with the name and the colour that the page gives them."""

    label: str
    colour: str
    runs: Sequence[RecordedRun]

    @property
    def sound(self) -> list[RecordedRun]:
        """The runs that neither became unstable nor failed."""
        return [r for r in self.runs if r.unstable_step is None and not r.status.startswith("failed")]

    def name_of(self, run: RecordedRun) -> str:
        """The name of one of its runs: with the seed if there are several."""
        return self.label if len(self.runs) == 1 else f"{self.label}, seed {run.config['seed']}"


@dataclass(frozen=True)
class Point:
    """Where runs are compared: words such as "after the last step", and the loss of a run there (nats a token)."""

    words: str
    loss: Callable[[RecordedRun], float | None]

    def by_seed(self, compared: Setting) -> dict[int, float]:
        """The finite losses of the sound runs, by seed."""
        losses = {int(r.config["seed"]): self.loss(r) for r in compared.sound}
        return {seed: x for seed, x in losses.items() if x is not None and math.isfinite(x)}


@dataclass(frozen=True)
class Verdict:
    """headline: one sentence. sentences: what follows from the numbers. cautions: why they may mislead. table: every setting against the leader."""

    headline: str
    sentences: list[str]
    cautions: list[str]
    table: Table | None


def point_of(settings: Sequence[Setting]) -> Point | None:
    """Where all sound runs can be compared: after the last step, or while some are training at the newest step that all have evaluated."""
    runs = [r for s in settings for r in s.sound if r.records.get("eval") or r.full is not None]
    if not runs:
        return None
    if all(r.finished for r in runs):
        if all(r.full is not None for r in runs):
            return Point("on the whole validation split after the last step", lambda r: r.full)
        return Point("on the validation windows after the last step", lambda r: r.final)
    shared = set.intersection(*(set(r.curve("eval")[0]) for r in runs))
    if not shared:
        return None
    step = max(shared)
    return Point(
        f"on the validation windows at step {step:,}, the newest that all have reached",
        lambda r: dict(zip(*r.curve("eval"))).get(step),
    )


def verdict(settings: Sequence[Setting]) -> Verdict:
    """What the runs of all settings say."""
    cautions = [*_troubles(settings), *_unlike(settings)]
    point = point_of(settings)
    losses = {} if point is None else {s.label: point.by_seed(s) for s in settings}
    known = [s for s in settings if losses.get(s.label)]
    if point is None or not known:
        return Verdict("No loss can be compared yet: no sound run has been evaluated.", [], cautions, None)
    means = {s.label: Estimate.of(list(losses[s.label].values())) for s in known}
    shared = set.intersection(*(set(losses[s.label]) for s in known))  # the seeds on which all can be compared
    leader = min(known, key=lambda s: fmean(losses[s.label][i] for i in shared) if shared else means[s.label].mean)
    mean = Estimate.of([losses[leader.label][i] for i in sorted(shared)]) if shared else means[leader.label]
    seeds = "one seed" if mean.count == 1 else f"{mean.count} seeds, ± is the standard error"
    if len(known) == 1:
        headline = f"{leader.label} has a loss of {mean.text(4)} nats a token {point.words} ({seeds})."
        return Verdict(headline, ["There is no other setting to compare with.", *_track(settings)], cautions, None)
    found = _against(leader, known, losses)
    among = " on the seeds that all have" if any(set(losses[s.label]) != shared for s in known) and shared else ""
    headline = f"{leader.label} has the lowest loss{among}: {mean.text(4)} nats a token {point.words} ({seeds})."
    sentences = [_lead(found), *_power(leader, found), *_track(settings)]
    return Verdict(headline, sentences, cautions, _table(leader, known, means, found))


ToLeader = dict[str, tuple[Difference, float]]
"""Label → its loss minus the leader's over the seeds of both, and p adjusted for the number of all pairs of settings."""


def _against(leader: Setting, known: Sequence[Setting], losses: dict[str, dict[int, float]]) -> ToLeader:
    """Every other setting against the leader.

    The leader was chosen by these same losses. So p is adjusted as if all pairs had been tested, among which every choice lies.
    """
    pairs, differences = [], []
    for a, b in combinations(known, 2):
        if losses[a.label].keys() & losses[b.label].keys():
            pairs.append((a.label, b.label))
            differences.append(Difference.of(losses[a.label], losses[b.label]))
    adjusted = dict(zip(pairs, holm([d.p for d in differences])))
    found = {}
    for s in known:
        if s is not leader and losses[s.label].keys() & losses[leader.label].keys():
            p = adjusted.get((s.label, leader.label), adjusted.get((leader.label, s.label), math.nan))
            found[s.label] = Difference.of(losses[s.label], losses[leader.label]), p
    return found


def _lead(found: ToLeader) -> str:
    if not found:
        return "No other setting was run with the same seeds, so no difference can be paired. Give all settings the same seeds."
    nearest = min(found, key=lambda label: found[label][0].mean)
    difference, p = found[nearest]
    way = "higher" if difference.mean >= 0 else "lower, on the seeds of both,"
    lead = f"The next is {nearest}, whose loss is {way} by {abs(difference.mean):.4f}"
    if difference.count == 1:
        return f"{lead} with the one seed that both have."
    interval = f"95% interval {difference.low:+.4f} to {difference.high:+.4f}, {difference.count} seeds, paired"
    if p < 0.05:
        return f"{lead} ({interval}). With all pairs taken into account, p is {p:.2g}: more than chance."
    return f"{lead} ({interval}). With all pairs taken into account, p is {p:.2g}: chance alone may explain it."


def _power(leader: Setting, found: ToLeader) -> list[str]:
    """What so many seeds could have seen, and what one seed cannot say."""
    single = {label: d for label, (d, _) in found.items() if d.count == 1}
    several = {label: d for label, (d, _) in found.items() if d.count > 1 and d.deviation > 0}
    sentences = []
    if several:
        nearest = min(several, key=lambda label: abs(several[label].mean))
        d = several[nearest]
        sees = detectable(d.count) * d.deviation
        needed = seeds_needed(d.mean / d.deviation)
        more = f"{needed} seeds would find it four times in five" if needed else "even a thousand seeds would miss it"
        sentences.append(
            f"Power: if differences scatter over seeds as these do, {d.count} seeds find a true difference from {nearest} of "
            f"{sees:.4f} or more four times in five. "
            f"If the measured difference of {d.mean:.4f} is the true one, {more}."
        )
    if single:
        nearest = min(single, key=lambda label: abs(single[label].mean))
        allowed = scatter_allowed(single[nearest].mean)
        sentences.append(
            "One seed cannot say how far chance moves a loss. "
            f"{leader.label} against {nearest} would be significant only if runs scatter over seeds by less than {allowed:.4f} "
            "(standard deviation). To learn it, train more seeds, for example with seed=1,2,3."
        )
    return sentences


def _track(settings: Sequence[Setting]) -> list[str]:
    """For runs of the public optimizer track, when each setting passes its one-sided rule. All runs count, also those that failed."""
    said = []
    for s in settings:
        curves = [dict(zip(*r.curve("eval"))) for r in s.runs]
        if all(curves) and all(text_at(s.runs[0].config, key) == value for key, value in TRACK.items()):
            step = stopping_step(curves)
            met = "is not met yet" if step is None else f"is first met at step {step:,}"
            said.append(f"{s.label}: the rule of the public optimizer track (p below .001, {len(curves)} runs) {met}.")
    return said


def _table(leader: Setting, known: Sequence[Setting], means: dict[str, Estimate], found: ToLeader) -> Table:
    headings = [
        "setting",
        "loss",
        "minus the leader",
        "95% interval",
        "p, all pairs",
        "could have seen",
        "seeds",
        "says",
    ]
    lines = []
    for s in sorted(known, key=lambda s: means[s.label].mean):
        line = [s.label, means[s.label].text(4)]
        if s is leader:
            lines.append([*line, "", "", "", "", str(means[s.label].count), "lowest"])
            continue
        if s.label not in found:
            lines.append([*line, "", "", "", "", "0", "no common seed"])
            continue
        d, p = found[s.label]
        several = d.count > 1
        cells = [
            f"{d.mean:+.4f}",
            f"{d.low:+.4f} to {d.high:+.4f}" if several else "",
            f"{p:.2g}" if several else "",
            f"{detectable(d.count) * d.deviation:.4f}" if several else "",
            str(d.count),
        ]
        says = ("higher" if p < 0.05 else "not told apart") if several else "one seed: unknown"
        lines.append([*line, *cells, says])
    return known_columns(Table(headings, lines, [False, *[True] * 6, False]))


def _troubles(settings: Sequence[Setting]) -> list[str]:
    """A sentence for every run that became unstable, failed, or warned."""
    said = []
    for s in settings:
        for r in s.runs:
            name = s.name_of(r)
            if r.unstable_step is not None or r.status.startswith("failed"):
                kind = "failed" if r.unstable_step is None else "unstable"
                last = [e for e in r.records["event"] if e["event"] == kind][-1]
                said.append(": ".join(filter(None, [name, r.status, last.get("message")])).rstrip(".") + ".")
            elif r.warned_step is not None:
                since = "it stayed stable" if r.finished else "it is stable so far"
                said.append(f"{name}: early warning of instability at step {r.warned_step:,}, but {since}.")
    return said


def _unlike(settings: Sequence[Setting]) -> list[str]:
    """A sentence if the settings differ in what makes losses comparable."""
    differ = [words for key, words in SAME.items() if len({text_at(s.runs[0].config, key) for s in settings}) > 1]
    if not differ:
        return []
    return [f"The settings differ in {', '.join(differ)}. Compare their losses with care."]
