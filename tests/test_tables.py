"""Tables of runs: which runs belong together, what a column says, and what stands below."""

from test_report import configuration, write_run

from scripts.analysis import figures
from scripts.analysis.page.details import machines
from scripts.analysis.page.verdict import Setting
from scripts.analysis.runs import RecordedRun, find_runs
from scripts.analysis.tables import (
    at_paper_scale,
    cell,
    footer,
    grouped,
    make_table,
    report_columns,
    settings_columns,
)
from training.config import compose
from training.log import METRICS_FILE


def test_trials_of_a_search_and_jobs_without_settings_are_left_out(tmp_path, capsys):
    config = configuration("hetero", steps=1)
    for name in ("a", "trials/b"):
        write_run(tmp_path / name, config, [{"kind": "eval", "step": 1, "loss": 2.0}])
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / METRICS_FILE).write_text('{"kind": "event", "step": 0, "event": "failed", "message": "x"}\n')
    assert [r.directory for r in find_runs([tmp_path])] == [tmp_path / "a"]
    said = capsys.readouterr().err
    assert "1 trials of a search left out; name their folder" in said and f"{tmp_path}/c left out: it failed" in said
    assert [r.directory for r in find_runs([tmp_path / "trials"])] == [tmp_path / "trials/b"]


def test_a_run_counts_once_and_a_seed_once_in_a_group(tmp_path, monkeypatch):
    config = configuration("hetero", steps=1)
    for name in ("a", "copy"):
        write_run(tmp_path / name, config, [{"kind": "eval", "step": 1, "loss": 2.0}])
    monkeypatch.chdir(tmp_path)
    runs = find_runs(["a", tmp_path / "a", tmp_path])
    assert [r.directory.name for r in runs] == ["a", "copy"]
    assert [len(group) for group in grouped(runs)] == [1, 1]


def test_measurements_of_a_run_that_goes_on_are_not_averaged_with_those_of_one_that_ended(tmp_path):
    for seed, records in ((1, [{"kind": "end", "step": 1}]), (2, [])):
        config = {**configuration("hetero", steps=1), "seed": seed}
        probe = {"kind": "probe", "step": 1, "least_entropy": 0.1 * seed, "greatest_saturation": 0.0}
        measured = [{"kind": "eval", "step": 1, "loss": 2.0 + seed}, probe]
        write_run(tmp_path / str(seed), config, [*measured, *records], end=False)
    groups = grouped(find_runs([tmp_path]))
    table = make_table(groups, report_columns(groups))
    found = dict(zip(table.headings, table.lines[0]))
    assert (found["final"], found["entropy"]) == ("3.0000 (1 of 2)", "0.10 (1 of 2)")


def test_the_foot_names_every_machine_and_how_many_commits(tmp_path):
    runs = [
        RecordedRun(tmp_path, configuration("hetero", steps=1), {}, {}, {"device": d, "code": c})
        for d, c in (("x", "x"), ("x", "y"), ("z", "y + changes"), ("z", None))
    ]
    machine = "{}, Python None, torch None, "
    last = f"{machine.format('x')}; {machine.format('z')}; code of 2 commits."
    assert footer("command", runs).splitlines()[-1] == last


def test_the_foot_and_the_page_name_what_computed_the_steps_before_a_resumption(tmp_path):
    earlier = {"device": "x", "code": "a", "command": "first", "until": 5}
    environment = {"device": "z", "code": "b", "command": "second", "earlier": [earlier]}
    run = RecordedRun(tmp_path, configuration("hetero", steps=1), {}, {}, environment)
    foot = footer("command", [run])
    assert "x, Python None" in foot and "z, Python None" in foot and "code of 2 commits" in foot
    (line,) = machines([Setting("A", "#000000", [run])]).lines
    assert {"x; then z", "a; then b", "first; then second"} <= set(line)


def test_the_papers_losses_stand_at_its_scale_only():
    def run(*words):
        return RecordedRun("run", compose(["experiment=paper", *words]).plain(), {}, {}, {})

    assert at_paper_scale(run()) and at_paper_scale(run("assignment=hetero", "max_steps=60000"))
    for smaller in ("max_steps=10000", "model=gpt2_350m", "data=books", "global_batch_tokens=4096"):
        assert not at_paper_scale(run(smaller))


def test_a_table_says_nothing_of_what_a_run_does_not_have():
    def keys(*words):
        run = RecordedRun("run", compose(["experiment=paper", *words]).plain(), {}, {}, {})
        return {c.key: c.value(run) for c in report_columns([[run]])}

    whole, small = keys("assignment=hetero"), keys("assignment=hetero", "max_steps=10")
    assert whole["step_rule"] == "published" and "paper_val_loss" in whole and "paper_val_loss" not in small
    assert (small["attention"], small["mlp"]) == ("stiefel", "dgram")  # without records of spectra
    for words in (["optim=adamw"], ["optim=modular"], ["assignment=adamw"]):
        assert "step_rule" not in keys("assignment=unconstrained", *words)


def test_settings_of_muon_stand_below_runs_with_muon_only():
    adamw, hetero = (RecordedRun("run", configuration(name), {}, {}, {}) for name in ("adamw", "hetero"))
    assert "Muon" not in footer("x", [adamw]) and "step rule" not in footer("x", [adamw])
    for runs in ([hetero], [adamw, hetero]):
        assert "step rule `certified`, peak learning rate of Muon" in footer("x", runs)


def test_a_setting_that_follows_from_a_choice_has_no_column():
    def group(*words):
        config = compose(["assignment=hetero", *words]).plain()
        return [RecordedRun(" ".join(words), config, {}, {}, {})]

    def columns(groups):
        return [column.key for column in settings_columns(groups)]

    groups = [group("residual=pre_norm"), group("residual=geonorm"), group("residual=geonorm", "optim.muon.lr=0.5")]
    assert columns(groups) == ["residual.rule", "optim.muon.lr"] or columns(groups) == [
        "optim.muon.lr",
        "residual.rule",
    ]
    assert "residual.alpha" in columns(
        [group("residual=proj_sphere"), group("residual=proj_sphere", "residual.alpha=0.5"), group()]
    )
    label = figures.labels_of(groups)[1]
    assert label.startswith("Hetero, ") and "residual geonorm" in label


def columns_of(*configs):
    """The headings of the columns of settings, for runs of these overrides."""
    runs = [[RecordedRun(str(i), compose(list(words)).plain(), {}, {}, {})] for i, words in enumerate(configs)]
    return {column.heading: [column.value(group[0]) for group in runs] for column in settings_columns(runs)}


def test_settings_of_a_step_rule_have_columns_but_not_those_that_only_one_rule_has():
    assert columns_of(["optim.muon.rule.norm_cap=2"], ["optim.muon.rule.quality=high"]) == {
        "optim.muon.rule.norm_cap": ["2.0", ""],
        "optim.muon.rule.quality": ["default", "high"],
    }
    assert "optim.muon.rule.quality" not in columns_of(["optim=paper"], ["optim=manifold_muon"])


def test_the_end_of_the_decay_has_a_column_unless_it_is_the_last_step():
    key = "schedule.decay_steps"
    assert key not in columns_of(["max_steps=100"], ["max_steps=200"])
    assert columns_of(["max_steps=100"], ["max_steps=200"], ["max_steps=200", f"{key}=100"])[key] == [
        "100",
        "200",
        "100",
    ]


def test_assignments_of_one_name_show_their_rules():
    one, other = "{h.0: stiefel, h.1-3: dgram}", "{h.0: dgram, h.1-3: stiefel}"
    words = [["assignment=custom", f"assignment.rules={rules}"] for rules in (one, other)]
    assert columns_of(*words) == {"assignment.rules": [rules.strip("{}") for rules in (one, other)]}
    assert columns_of(["assignment=hetero"], ["assignment=hetero_inv"]) == {}


def test_a_run_that_was_resumed_under_other_settings_says_so_and_stands_alone(tmp_path):
    event = {"kind": "event", "step": 5, "event": "changed", "settings": ["optim.muon.lr: 0.05 → 0.01"]}
    ends = [{"kind": "eval", "step": 10, "loss": 2.0}, {"kind": "end", "step": 10}]
    changes = {1: [], 2: [event], 3: [event, event], 4: []}  # twice: it was resumed from that checkpoint again
    for seed, events in changes.items():
        write_run(tmp_path / str(seed), {**configuration("hetero", steps=10), "seed": seed}, [*events, *ends])
    groups = grouped(find_runs([tmp_path]))
    assert [[r.config["seed"] for r in group] for group in groups] == [[1, 4], [2, 3]]
    assert [groups[0][0].status, groups[1][0].status] == ["ok", "ok, changed at step 5"]


def test_values_of_a_line():
    assert cell([1.0], 2) == "1.00" and cell([None], 2) == ""
    assert cell([3.0, None, 4.0], 0) == "4 ± 0 (2 of 3)" and cell([2.0, 2.0], 2) == "2.00"
    assert cell([1.0, float("nan")], 2) == "nan ± nan"
    assert cell(["ok", "ok"], 2) == "ok"
    assert cell(["ok", "unstable at step 3", "ok"], 2) == "2 x ok, unstable at step 3"
