"""Pictures: every setting can be told from the others, and what is not drawn is said."""

import json
import math
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from scripts.analysis import experiment_figures, figures
from scripts.analysis.runs import RecordedRun
from training.config import compose

NOWHERE = Path("not written")


@pytest.fixture(scope="module")
def config():
    return compose(["assignment=adamw"]).plain()


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn, which are not written."""
    found = []

    @contextmanager
    def picture(path, width, height, grid=True):
        found.append(Figure(figsize=(width, height)))
        yield found[-1]

    for module in (figures, experiment_figures):
        monkeypatch.setattr(module, "picture", picture)
    return found


def run(config, losses, name="AdamW", **changes):
    """A run with these validation losses after the steps 0, 1 and so on."""
    config = json.loads(json.dumps(config)) | changes
    config["assignment"]["name"] = name
    records = {"eval": [{"step": step, "loss": loss} for step, loss in enumerate(losses)]}
    return RecordedRun(NOWHERE, config, records, {}, {})


def words_of(legend):
    return [text.get_text() for text in legend.get_texts()]


def crosses(axes):
    """The places of the crosses along the axis, a list for each curve that has some."""
    return [list(line.get_xdata()) for line in axes.lines if line.get_marker() == "x" and len(line.get_xdata())]


def test_every_setting_has_a_label_of_its_own(config, monkeypatch):
    """Of three settings in which they differ, a label names two. What differs is looked up once for all labels."""
    found, columns = [], figures.settings_columns
    monkeypatch.setattr(figures, "settings_columns", lambda groups: found.append(columns(groups)) or found[-1])
    values = [(a, b, c) for a in (100, 200) for b in (32, 64) for c in (1.0, 2.0)]
    groups = [[run(config, [], max_steps=a, eval_windows=b, grad_clip=c)] for a, b, c in values]
    labels = figures.labels_of(groups)
    assert len({*labels}) == 8 and len(found) == 1 and len(found[0]) == 3
    assert sum(label.endswith(" (1)") for label in labels) == sum(label.endswith(" (2)") for label in labels) == 4
    assert figures.labels_of(groups[:1]) == ["AdamW"]


def test_curves_of_one_colour_have_different_dashes(config, drawn):
    groups = [[run(config, [5.0, 4.0], max_steps=steps)] for steps in range(1, 13)]
    figures.draw_losses(groups, NOWHERE)
    for axes in drawn[0].axes:
        styles = [(line.get_color(), line.get_linestyle()) for line in axes.lines]
        assert len(styles) == len({*styles}) == 12


def test_a_label_says_of_how_many_seeds_its_loss_is(config, drawn):
    whole = [run(config, [5.0, 3.0], seed=seed) for seed in (1, 2)]
    part = [run(config, [5.0, loss], "Hetero", seed=seed) for seed, loss in ((1, 3.5), (2, math.nan))]
    figures.draw_losses([whole, part], NOWHERE)
    said = [text.get_text() for text in drawn[0].axes[1].texts]
    assert said[0].endswith("  3.000") and said[1].endswith("  3.500 (1 of 2)")


def test_unstable_trials_are_crosses_and_what_they_mean_is_said(drawn):
    trials = {"SGD": [(0.1, 3.0), (0.4, math.inf)], "Muon": [(0.1, 2.8), (0.8, math.inf), (0.4, math.inf)]}
    experiment_figures.loss_of_trials({"lr": {"steps 1": trials}}, NOWHERE)
    experiment_figures.loss_of_trials({"lr": {"steps 1": {"SGD": [(0.1, 3.0), (0.2, 2.9)]}}}, NOWHERE)
    assert crosses(drawn[0].axes[0]) == [[0.4], [0.8, 0.4]] and crosses(drawn[1].axes[0]) == []
    assert [words_of(figure.legends[0]) for figure in drawn] == [["SGD", "Muon", "unstable"], ["SGD"]]


def test_the_crosses_of_many_curves_stay_near_the_upper_edge(drawn):
    trials = {f"optimizer {i}": [(0.1, 3.0), (0.4, math.inf)] for i in range(15)}
    experiment_figures.loss_of_trials({"lr": {"steps 1": trials}}, NOWHERE)
    heights = [line.get_ydata()[0] for line in drawn[0].axes[0].lines if line.get_marker() == "x"]
    assert len({*heights}) == 15 and max(heights) == 1 and min(heights) > 0.85


def test_a_rate_with_an_unstable_seed_is_a_cross(drawn):
    curve = {0.1: [3.0, 3.1], 0.2: [2.9, math.inf], 0.4: [3.2, 3.3]}
    experiment_figures.loss_by_rate([[("width 16", {"GPT": curve})]], NOWHERE)
    experiment_figures.loss_by_rate([[("width 16", {"GPT": {0.1: [3.0], 0.2: [2.9]}})]], NOWHERE)
    assert crosses(drawn[0].axes[0]) == [[0.2]] and words_of(drawn[0].legends[0]) == ["a seed became unstable"]
    assert crosses(drawn[1].axes[0]) == [] and not drawn[1].legends


def test_the_cross_of_an_unstable_network_is_in_the_legend(drawn):
    cell = {"kind": "assignments", "angle": 0.1, "gradient": 0.2}
    experiment_figures.loss_against_exponents([cell | {"loss": 3.0}, cell | {"loss": None}], NOWHERE)
    experiment_figures.loss_against_exponents([cell | {"loss": 3.0}], NOWHERE)
    assert [words_of(figure.legends[0]) for figure in drawn] == [["assignments", "unstable"], ["assignments"]]


def test_assignments_that_are_not_the_papers_have_colours_of_their_own(config, drawn):
    runs = [run(config, [5.0, 4.0], name) for name in ("AdamW", "All-Spectral-Ball", "Hetero")]
    experiment_figures.warning_signs({"rate 1": runs}, NOWHERE)
    colours = [line.get_color() for line in drawn[0].legends[0].get_lines()[:3]]
    assert len({*colours}) == 3 and colours[2] == figures.ASSIGNMENT_COLOURS["Hetero"]


def test_labels_of_curves_do_not_overlap():
    gap = 1.0
    for heights in ([0.0, 0.1, 0.2, 5.0], [1.0], [0.0, 2.0, 2.5, 3.2], [4.0] * 5):
        spread = figures._spread(heights, gap)
        assert all(b - a >= gap - 1e-9 for a, b in pairwise(spread))
        assert sum(spread) == pytest.approx(sum(heights))
    assert figures._spread([0.0, 2.0], gap) == [0.0, 2.0]
