"""The verdict of the report in words: leader, interval, power, one seed, what went wrong."""

import random

import pytest

from scripts.analysis.page.verdict import Setting, verdict
from scripts.analysis.runs import RecordedRun
from scripts.analysis.statistics import Difference, detectable, seeds_needed


def fake(label, losses, steps=100, end=True, events=(), **config):
    """A setting whose runs have these losses by seed at the end, and 5.0 at the half."""
    runs = []
    for seed, loss in losses.items():
        evals = [{"step": steps // 2, "loss": 5.0}, *([{"step": steps, "loss": loss}] if loss is not None else [])]
        records = (
            {"eval": evals} | ({"event": list(events)} if events else {}) | ({"end": [{"step": steps}]} if end else {})
        )
        runs.append(RecordedRun(label, {"seed": seed, "max_steps": steps, **config}, records, {}, {}))
    return Setting(label, "#000000", runs)


def pair(effect, seeds, rng):
    common = {seed: rng.gauss(3, 0.1) for seed in range(seeds)}
    return fake("A", common), fake("B", {seed: x + rng.gauss(effect, 0.01) for seed, x in common.items()})


@pytest.mark.parametrize(("effect", "least", "most"), [(0.0, 0.0, 0.12), (0.05, 0.95, 1.0)])
def test_a_true_difference_is_found_and_a_null_one_is_not(effect, least, most):
    rng, trials = random.Random(5), 80
    said = [" ".join(verdict(pair(effect, 4, rng)).sentences) for _ in range(trials)]
    assert all(("more than chance" in text) != ("chance alone may explain it" in text) for text in said)
    assert least <= sum("more than chance" in text for text in said) / trials <= most


def test_the_verdict_names_the_leader_the_interval_and_the_power():
    said = verdict([fake("A", {1: 2.00, 2: 2.11, 3: 2.19}), fake("B", {1: 2.10, 2: 2.20, 3: 2.30})])
    assert said.headline.startswith("A has the lowest loss: 2.1000 ± ") and "3 seeds" in said.headline
    text = " ".join(said.sentences)
    assert "The next is B, whose loss is higher by 0.1000" in text and "95% interval +0.0752 to +0.1248" in text
    assert "Power: if differences scatter over seeds as these do, 3 seeds find a true difference from B of 0.0" in text
    sees, needed = f"{detectable(3) * 0.01:.4f}", seeds_needed(0.1 / 0.01)
    assert f"from B of {sees} or more" in text and f"{needed} seeds would find it four times in five" in text
    assert said.table.lines[1][5] == sees
    assert [line[0] for line in said.table.lines] == ["A", "B"] and said.table.lines[1][-1] == "higher"


def test_of_three_settings_the_nearest_is_named_and_p_counts_all_pairs():
    a, b = {1: 2.00, 2: 2.11, 3: 2.19}, {1: 2.10, 2: 2.20, 3: 2.30}
    said = verdict([fake("C", {1: 2.3, 2: 2.6, 3: 2.9}), fake("B", b), fake("A", a)])
    text = " ".join(said.sentences)
    assert "The next is B, " in text and "a true difference from B of" in text
    assert [line[0] for line in said.table.lines] == ["A", "B", "C"]
    assert said.table.lines[1][4] == f"{3 * Difference.of(b, a).p:.2g}"  # the least of three


def test_seeds_that_differ_alike_have_no_power():
    said = verdict([fake("A", {1: 2.0, 2: 2.5}), fake("B", {1: 2.25, 2: 2.75})])
    assert "p is 0: more than chance" in said.sentences[0] and len(said.sentences) == 1


def test_the_whole_split_counts_only_if_all_have_its_loss():
    compared = [fake("A", {1: 2.0}), fake("B", {1: 2.1})]
    compared[0].runs[0].records["full_eval"] = [{"step": 100, "loss": 1.9}]
    assert "A has the lowest loss: 2.0000 nats a token on the validation windows" in verdict(compared).headline
    compared[1].runs[0].records["full_eval"] = [{"step": 100, "loss": 1.8}]
    assert "B has the lowest loss: 1.8000 nats a token on the whole validation split" in verdict(compared).headline


def test_one_seed_is_said_to_be_one():
    said = verdict([fake("A", {1: 2.0}), fake("B", {1: 2.05, 2: 3.0})])
    text = " ".join(said.sentences)
    assert "One seed cannot say" in text and "less than 0.0180" in text and "chance alone" not in text
    assert said.table.lines[1][-1] == "one seed: unknown"
    three = verdict([fake("A", {1: 2.0}), fake("C", {1: 2.5}), fake("B", {1: 2.05})])
    assert "A against B would be significant only" in " ".join(three.sentences)


def test_runs_that_train_are_compared_where_all_have_been():
    said = verdict([fake("A", {1: 2.0}, end=False), fake("B", {1: None}, end=False)])
    silent = Setting("A", "#000000", [RecordedRun("A", {"seed": 1, "max_steps": 9}, {}, {}, {})])
    later = verdict([fake("A", {1: 2.0}, end=False), fake("B", {1: 2.1}, end=False)])
    assert "A has the lowest loss: 2.0000 nats a token on the validation windows at step 100," in later.headline
    assert "at step 50, the newest that all have reached" in said.headline and "5.0000" in said.headline
    assert "No loss can be compared" in verdict([silent]).headline


def test_the_leader_has_the_lowest_loss_on_the_seeds_that_all_have():
    """The other's better seed alone must not make it the leader, as its one seed in common is the worse one."""
    said = verdict([fake("A", {1: 2.30, 2: 2.20}), fake("B", {1: 2.29})])
    assert said.headline.startswith("B has the lowest loss on the seeds that all have: 2.2900")
    assert "The next is A, whose loss is higher by 0.0100" in said.sentences[0]


def test_a_warning_of_a_run_that_trains_is_not_denied():
    warned = [{"step": 40, "event": "warning"}]
    for end, words in ((True, "but it stayed stable"), (False, "but it is stable so far")):
        said = verdict([fake("A", {1: 2.0}), fake("B", {1: 2.1}, events=warned, end=end)])
        assert f"B: early warning of instability at step 40, {words}." in said.cautions


def test_a_failure_before_a_resume_is_past():
    failed = {"step": 50, "event": "failed", "message": "killed"}
    [run] = fake("A", {1: 2.0}, end=False, events=[failed]).runs
    assert run.status == "unfinished at step 100"
    again = {**failed, "step": 100, "message": "no memory"}
    said = verdict([fake("A", {1: 2.0}, end=False, events=[failed, again]), fake("B", {1: 2.1})])
    assert said.cautions == ["A: failed at step 100: no memory."] and said.headline.startswith("B has a loss of 2.1000")
    unstable = {"step": 40, "event": "unstable", "message": "the loss rose"}
    said = verdict([fake("A", {1: 2.0}), fake("B", {1: 2.0}, events=[unstable, failed])])
    assert "B: unstable at step 40: the loss rose." in said.cautions


def test_what_went_wrong_and_what_cannot_be_compared_is_said():
    event = {"step": 70, "event": "unstable", "message": "the loss rose by 0.7"}
    said = verdict([fake("A", {1: 2.0}), fake("B", {1: 1.0}, events=[event], data={"name": "books"})])
    assert said.headline.startswith("A has a loss") and any("differ in the data" in c for c in said.cautions)
    assert "B: unstable at step 70: the loss rose by 0.7." in said.cautions
    contexts = [fake(str(size), {1: 2.0}, model={"block_size": size}) for size in (128, 256)]
    assert verdict(contexts).cautions == ["The settings differ in the context. Compare their losses with care."]
    other = fake("B", {1: 2.0}, 200, data={"tokenizer": "gpt2"}, global_batch_tokens=64, eval_windows=4)
    words = "the tokenizer, the number of steps, the tokens of a step, the validation windows"
    assert verdict([fake("A", {1: 2.0}), other]).cautions == [
        f"The settings differ in {words}. Compare their losses with care."
    ]
    apart = verdict([fake("A", {1: 2.0}), fake("B", {2: 1.0})])
    assert "Give all settings the same seeds" in apart.sentences[0]


def test_the_rule_of_the_track_is_applied_to_its_runs_only():
    shape = {"global_batch_tokens": 524288, "eval_windows": 10240, "data": {"source": "bin"}}
    ours = [fake("A", {1: 3.275, 2: 3.276}, **shape), fake("B", {1: 3.279, 2: 3.279}, **shape)]
    text = " ".join(verdict(ours).sentences)
    assert "A: the rule of the public optimizer track (p below .001, 2 runs) is first met at step 100" in text
    assert "B: the rule of the public optimizer track (p below .001, 2 runs) is not met yet" in text
    failed = fake("A", {3: 3.3}, events=[{"step": 50, "event": "unstable"}], **shape)
    both = Setting("A", "#000000", [*ours[0].runs, *failed.runs])
    assert "(p below .001, 3 runs) is not met yet" in " ".join(verdict([both]).sentences)
    assert "track" not in " ".join(verdict([fake("A", {1: 3.0}), fake("B", {1: 3.1})]).sentences)
