"""The page: few points of many, the verdict in words, one file that needs nothing else, live, and in a real browser."""

import json
import math
import os
import random
import re
import subprocess
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
import yaml
from browser import PROGRAM, Browser
from conftest import ROOT

from scripts import report
from scripts.analysis import figures, thin
from scripts.analysis.runs import RecordedRun, find_runs
from scripts.analysis.tables import (
    about,
    grouped,
)
from training.config import compose
from training.log import METRICS_FILE, RunLog

PAGE = ROOT / "scripts/analysis/page"
LAYERS, HEADS, STEPS = 12, 12, 50_000
MATRICES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
library = pytest.mark.skipif(not report.has_library(), reason="bokeh, which draws the page, is not installed")
browser_needed = pytest.mark.skipif(PROGRAM is None, reason="no chromium; apt-get install chromium runs this test")


def configuration(assignment, seed=1, steps=STEPS, **changes):
    words = [f"assignment={assignment}", f"seed={seed}", f"max_steps={steps}", "model=gpt2_124m", "data=openwebtext"]
    return compose([*words, *(f"{key}={value}" for key, value in changes.items())]).plain()


def write_run(directory, config, records, end=True):
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    (directory / "parameters.txt").write_text(f"parameters of {config['assignment']['name']} <b>\n")
    with (directory / METRICS_FILE).open("w") as file:
        last = {"kind": "end", "step": config["max_steps"], "train_seconds": 100.0, "time": {"eval": 3.0}}
        file.writelines(json.dumps(record) + "\n" for record in [*records, *([last] if end else [])])
    return directory


def long_run(shift, rng, steps=STEPS):
    """The records of a run of 124M parameters: a curve of losses, spectra, probes and certificates."""
    for step in range(0, steps + 1, 20):
        loss = 3.0 + 4 * math.exp(-step / 4000) + shift + rng.gauss(0, 0.02)
        more = {"grad_norm": 1 + rng.random(), "tokens_per_s": 4e5, "mfu": 0.4, "time": {"optimizer": 1.0, "data": 0.1}}
        yield {"kind": "train", "step": step, "loss": loss, **more}
        if step % 2000 == 0:
            yield {"kind": "eval", "step": step, "loss": loss}
            for layer in range(LAYERS):
                for kind in MATRICES:
                    sigma = [(1 + layer / 20) * (1 - i / 40) for i in range(32)]
                    name = f"transformer.h.{layer}.{kind}.weight"
                    yield {"kind": "spectra", "step": step, "name": name, "sigma": sigma, "distance": 1e-6}
                    yield {"kind": "certificate", "step": step, "name": name, "feas": 0.95}
            grid = [[0.5 + 0.01 * (layer + head) for head in range(HEADS)] for layer in range(LAYERS)]
            summary = {"largest_logit": 5.0, "least_entropy": 0.5, "greatest_saturation": 0.1}
            yield {"kind": "probe", "step": step, "logit_max": grid, "entropy": grid, "saturated": grid, **summary}
            alphas = {key: [0.05 + 1e-6 * step + 0.01 * i for i in range(LAYERS)] for key in ("mean", "deviation")}
            yield {"kind": "scales", "step": step, "name": "alpha_attn", **alphas}
            yield {"kind": "scales", "step": step, "name": "s_z", "mean": 1.0 + 1e-5 * step, "deviation": 0.1}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Ten runs of 50,000 steps: five assignments, two seeds."""
    folder, rng = tmp_path_factory.mktemp("sweep"), random.Random(0)
    for i, assignment in enumerate(("unconstrained", "all_stiefel", "all_dgram", "hetero", "hetero_inv")):
        config = configuration(assignment)
        for seed in (1, 2):
            write_run(folder / f"{assignment},seed={seed}", {**config, "seed": seed}, long_run(0.03 * i, rng))
    return folder


@pytest.fixture(scope="module")
def page(sweep, tmp_path_factory):
    """The page of the sweep, in a file."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    assert report.main([str(sweep), f"page={path}"]) == 0
    return path


# ---- few points of many ----


def test_a_thin_curve_keeps_its_spikes_and_its_gaps():
    values = np.sin(np.arange(50_000) / 5000)
    values[[17, 33_333]] = 9.0, -9.0
    values[40_000:45_000] = np.inf
    steps, few = thin.thin(range(50_000), values)
    assert len(steps) <= thin.POINTS and (np.diff(steps) > 0).all()
    assert {(17, 9.0), (33_333, -9.0)} <= set(zip(steps.tolist(), few.tolist()))
    assert np.isnan(few[(steps > 40_200) & (steps < 44_800)]).all() and np.isfinite(few[steps < 39_000]).all()
    assert [v.tolist() for v in thin.thin([1, 2], [3.0, 4.0])] == [[1, 2], [3, 4]]


def test_seeds_of_different_length_have_the_same_stretches():
    """Otherwise hardly any of their last steps would be common, and the line would have gaps or points of other steps."""
    lengths = (1000, 600, 997)
    curves = thin.shared([(list(range(n)), [1.0] * n) for n in lengths])
    steps = [thin.stretches(*curve, np.nanmean)[0] for curve in curves]
    assert len(steps[0]) == thin.STRETCHES and steps[0][-1] == 599 and steps[0] == steps[1] == steps[2]
    assert len(thin.band([thin.stretches(*curve, np.nanmean) for curve in curves])[0]) == thin.STRETCHES


def test_a_curve_that_scatters_is_read_in_stretches():
    values = [float(i % 10) for i in range(10_000)]
    steps, means = thin.stretches(range(10_000), values, np.nanmean, most=100)
    assert len(steps) == 100 and steps[-1] == 9999 and set(means) == {4.5}
    values[5:105] = [math.inf] * 100
    assert math.isnan(thin.stretches(range(10_000), values, np.nanmax, most=1000)[1][5])
    assert thin.stretches([1, 2], [3.0, math.nan], np.nanmax)[0] == [1, 2]


def test_a_band_goes_from_the_lowest_to_the_highest_seed():
    steps, mean, low, high = thin.band([([0, 5, 10], [1.0, 2.0, 3.0]), ([0, 10], [3.0, 7.0])])
    assert [v.tolist() for v in (steps, mean, low, high)] == [[0, 10], [2, 5], [1, 3], [3, 7]]
    assert [len(v) for v in thin.band([([0], [1.0]), ([5], [1.0])])] == [0] * 4


def test_places_of_matrices_and_short_numbers():
    assert thin.kind_and_layer("transformer.h.3.attn.c_attn.weight") == ("attn.c_attn", 3)
    assert thin.kind_and_layer("lm_head.weight") == ("lm_head", 0) and thin.kind_and_layer("blocks.7.weight") == (
        "blocks",
        7,
    )
    assert thin.shortened([1.23456, math.inf, 7, None]) == [1.235, None, 7, None]
    assert thin.evenly(range(100), 3) == [0, 50, 99] and thin.evenly([1], 3) == [1]


# ---- learned scales ----


def test_learned_scales_are_drawn_by_layer_and_stand_on_the_page(sweep, page, tmp_path):
    runs = find_runs([sweep])[:2]
    scales = thin.learned_scales(runs[0])
    assert scales["s_z"]["steps"][-1] == STEPS and scales["s_z"]["mean"][-1] == [pytest.approx(1.5)]
    assert len(scales["alpha_attn"]["mean"][0]) == LAYERS and scales["alpha_attn"]["deviation"][0][2] == 0.07
    without = RecordedRun(runs[0].directory, runs[0].config, {}, {}, {})
    assert figures.draw_scales([("none", [without])], tmp_path / "none.png") is None
    assert figures.draw_scales([("some", [without, runs[0]])], tmp_path / "scales.png").stat().st_size > 5000
    text = page.read_text()
    assert '<h2 id="scales">' in text and 'data-chart="scale-s_z"' in text


# ---- the page ----


def test_colours_have_contrast():
    dark = re.search(r'"dark"\].*?--paper: (#\w+)', (PAGE / "page.css").read_text())[1]
    for colour in (*figures.ASSIGNMENT_COLOURS.values(), *figures.OTHER_COLOURS):
        assert min(figures.contrast(colour, paper) for paper in ("#ffffff", dark)) >= 3, colour
        assert figures.contrast(figures.text_colour(colour), "#ffffff") >= 4.5
    assert figures.contrast("#000000", "#ffffff") == pytest.approx(21)


@library
def test_the_page_is_one_small_file_that_needs_nothing(page):
    text = page.read_text()
    data = sum(map(len, re.findall(r'<script type="application/json".*?</script>', text, re.DOTALL)))
    assert len(text.encode()) - data < 2e6 and len(text) < 8e6
    outside = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r'(src|href)="(?!data:,)', outside) and "@import" not in outside and "url(" not in outside
    for assignment in ("Unconstrained", "All-Stiefel", "All-DGram", "Hetero", "Hetero-Inv"):
        assert f'data-label="{assignment}"' in text and f"parameters of {assignment} &lt;b&gt;" in text
    assert outside.count(about([RecordedRun("run", configuration("hetero"), {}, {}, {})])) > 15, (
        "every figure says model, data and steps"
    )
    assert "python scripts/report.py" in outside and "Unconstrained has the lowest loss" in outside


@library
def test_text_of_a_run_cannot_become_a_part_of_the_page(tmp_path, capsys):
    evil = "</script><script>alert(1)</script>"
    config = configuration("hetero", steps=10)
    config["assignment"]["name"] = evil
    event = {"kind": "event", "step": 5, "event": "unstable", "message": evil}
    write_run(tmp_path / "run", config, [{"kind": "eval", "step": 5, "loss": 3.0}, event])
    assert report.main([str(tmp_path)]) == 0 and f"written: {tmp_path}/report.html" in capsys.readouterr().out
    assert evil not in (tmp_path / "report.html").read_text()


@library
def test_a_run_that_has_written_almost_nothing_has_a_page(tmp_path):
    write_run(tmp_path / "a", configuration("hetero", steps=10), [], end=False)
    write_run(tmp_path / "b", configuration("adamw", steps=10), [{"kind": "probe", "step": 1}], end=False)
    assert report.main([str(tmp_path)]) == 0
    assert "No loss can be compared yet" in (tmp_path / "report.html").read_text()


def test_without_the_library_the_table_is_printed_and_the_remedy(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "has_library", lambda: False)
    write_run(tmp_path / "run", configuration("hetero", steps=10), [{"kind": "eval", "step": 5, "loss": 3.0}])
    assert report.main([str(tmp_path), f"figures={tmp_path}/figures"]) == 0
    out, err = capsys.readouterr()
    assert "3.0000" in out and "val_loss.png" in out and "pip install bokeh" in err
    assert not (tmp_path / "report.html").exists()
    assert report.main([str(tmp_path), "page=none"]) == 0
    assert report.main([str(tmp_path), "live=true", "page=none"]) == 2  # which writes no page anyway
    assert capsys.readouterr().err == f"{report.NO_LIBRARY}\n"


@library
def test_a_page_that_cannot_be_written_is_one_message(tmp_path, capsys):
    write_run(tmp_path / "run", configuration("hetero", steps=10), [])
    assert report.main([str(tmp_path), f"page={tmp_path}/none/report.html"]) == 2
    assert "name another file with page=" in capsys.readouterr().err


# ---- live ----


@pytest.fixture
def served(tmp_path):
    """A run that trains, its directory, and the address of its live page."""
    from scripts.analysis.page import live
    from scripts.analysis.page.page import make

    run = write_run(
        tmp_path / "run", configuration("hetero", steps=100), [{"kind": "eval", "step": 5, "loss": 3.0}], False
    )
    server = live.server([str(tmp_path)], lambda: make(grouped(find_runs([tmp_path])), "live", "command", 0.3), 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield run, server.server_address
    server.shutdown()
    thread.join()
    server.server_close()


def fetch(address, path, host=None):
    request = urllib.request.Request(f"http://{address[0]}:{address[1]}{path}")
    if host:
        request.add_header("Host", host)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.read().decode()


@library
def test_a_live_page_follows_the_runs_and_answers_this_machine_only(served):
    run, address = served
    assert address[0] == "127.0.0.1"
    before = fetch(address, "/stamp")
    assert "3.0000" in fetch(address, "/") and fetch(address, "/stamp") == before
    log = RunLog(run)
    log.write("eval", 10, loss=2.5)
    log.close()
    assert fetch(address, "/stamp") != before and "2.5000" in fetch(address, "/")
    for path, host, code in (("/", "evil.example:80", 403), ("/etc/passwd", None, 404)):
        with pytest.raises(urllib.error.HTTPError, match=str(code)):
            fetch(address, path, host)


@library
def test_a_port_that_is_taken_is_said(served):
    from scripts.analysis.page import live
    from scripts.command import UsageError

    for port in (served[1][1], 70_000):
        with pytest.raises(UsageError, match="name another"):
            live.server([], str, port)


# ---- in a browser ----


@pytest.fixture(scope="module")
def browser():
    if PROGRAM is None:
        pytest.skip("no chromium")
    opened = Browser()
    yield opened
    opened.close()


DRAWN = "[...document.querySelectorAll('.chart')].every(c => c.dataset.state == 'drawn')"
PLOTS = "[...Bokeh.documents].flatMap(d => [...(d.all_models ?? d._all_models.values())])"


def open_all(browser, path, **window):
    """Open a page and draw all its charts."""
    browser.errors.clear()
    browser.open(path.as_uri(), **window)
    browser.get("sessionStorage.clear(); dispatchEvent(new Event('beforeprint'))")
    browser.until(DRAWN)


@library
@browser_needed
@pytest.mark.parametrize(("width", "phone", "dark"), [(1280, False, False), (390, True, True)])
def test_the_page_is_drawn_without_an_error_at_any_width(browser, page, width, phone, dark):
    open_all(browser, page, width=width, phone=phone, dark=dark)
    assert browser.get("document.querySelectorAll('.chart').length") == 20
    assert browser.get("document.documentElement.scrollWidth") <= width, "the page does not scroll sideways"
    assert browser.get("getComputedStyle(document.body).backgroundColor") == (
        "rgb(20, 23, 27)" if dark else "rgb(255, 255, 255)"
    )
    label = browser.get(f"{PLOTS}.find(m => m.type == 'LinearAxis').major_label_text_color.value ?? 0") or browser.get(
        f"{PLOTS}.find(m => m.type == 'LinearAxis').major_label_text_color"
    )
    assert label == ("#a3adb8" if dark else "#59626d")
    assert browser.errors == []


@library
@browser_needed
def test_a_click_hides_a_setting_and_the_slider_moves_the_spectrum(browser, page):
    open_all(browser, page)
    shown = f"{PLOTS}.filter(m => m.tags?.includes('setting-1')).map(m => m.visible)"
    assert set(browser.get(shown)) == {True} and len(browser.get(shown)) > 10
    browser.click("[data-setting='1']")
    assert set(browser.get(shown)) == {False}
    assert browser.get("document.querySelector(\"[data-setting='1']\").getAttribute('aria-pressed')") == "false"
    browser.click("[data-setting='1']")
    assert set(browser.get(shown)) == {True}

    said = "document.getElementById('shape-said').textContent"
    assert browser.get(said) == "50,000"
    browser.click("#shape-step")
    browser.press("Home")
    browser.press("ArrowRight")
    assert browser.get(said) == "2,000"
    before = browser.get(f"{PLOTS}.find(m => m.name == 'shape-0').data.y[0]")
    browser.get(
        "(s => { s.value = 'mlp.c_fc|11'; s.dispatchEvent(new Event('change')); })(document.getElementById('shape-matrix'))"
    )
    assert before == pytest.approx(1.0) and browser.get(
        f"{PLOTS}.find(m => m.name == 'shape-0').data.y[0]"
    ) == pytest.approx(1.55)
    assert browser.errors == []


@library
@browser_needed
def test_ten_long_runs_open_fast_and_stay_fluent(browser, page):
    started = time.perf_counter()
    browser.open(page.as_uri())
    browser.until("document.querySelector('.chart').dataset.state == 'drawn'")
    assert time.perf_counter() - started < 8, "two seconds on an idle machine; tests may share it"
    browser.get("document.querySelector('#chart-train_loss').scrollIntoView({block: 'center'})")
    browser.until("document.querySelector('#chart-train_loss').dataset.state == 'drawn'")
    x, y = browser.get("(r => [r.x, r.y + 150])(document.querySelector('#chart-train_loss').getBoundingClientRect())")
    started = time.perf_counter()
    for i in range(30):
        browser.move(x + 60 + 10 * i, y)
        browser.get("new Promise(requestAnimationFrame)")
    assert (time.perf_counter() - started) / 30 < 0.5 and browser.errors == []


@library
@browser_needed
def test_a_live_page_shows_a_new_record_and_keeps_what_was_hidden(browser, served):
    run, address = served
    browser.errors.clear()
    browser.open(f"http://{address[0]}:{address[1]}/")
    browser.until("document.body.dataset.stamp")
    browser.click(".chip")
    log = RunLog(run)
    log.write("eval", 10, loss=2.5)
    log.close()
    browser.until("document.querySelector('.headline')?.textContent.includes('2.5000')")
    browser.until("document.querySelector('.chip')?.getAttribute('aria-pressed') == 'false'")
    assert browser.errors == []
    browser.open("about:blank")  # so that it asks no server that has ended


@library
@browser_needed
def test_a_newcomer_trains_two_assignments_and_compares_them_in_the_browser(tiny, train_here, tmp_path, browser):
    words = [word for word in tiny if not word.startswith("output_dir")]
    for assignment in ("all_stiefel", "hetero"):
        more = ["average=ema", "log.interval_updates=5", f"output_dir={tmp_path}/runs/{assignment}"]
        out = train_here(f"assignment={assignment}", *words, *more)
        assert out.returncode == 0, out.stderr
    assert report.main([f"{tmp_path}/runs"]) == 0
    open_all(browser, tmp_path / "runs/report.html")
    assert browser.get("[...document.querySelectorAll('.chip')].map(c => c.textContent)") == ["All-Stiefel", "Hetero"]
    differ = browser.get("document.querySelector('#differences').textContent")
    shown = browser.get("[...document.querySelectorAll('.chart')].map(c => c.dataset.chart)")
    assert {"val_loss", "average", "update", "change"} <= set(shown)
    where = browser.get("document.querySelector('#machines').textContent")
    assert (
        "python train.py assignment=hetero" in where
        and "assignment.rules.mlp" in differ
        and "dgram" in differ
        and browser.errors == []
    )


@pytest.mark.campaign
@pytest.mark.timeout(1500)
def test_a_newcomer_clones_reproduces_looks_and_changes_one_thing(tmp_path, browser):
    """The README's first command in a fresh clone, then its runs on one page beside a run with another assignment."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    plain = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}  # as a newcomer has it
    subprocess.run(["make", "reproduce", "OPTIONS=max_steps=50"], cwd=clone, env=plain, check=True)
    python = str(clone / ".venv/bin/python")
    words = ["train.py", "assignment=all_oblique", "max_steps=50", "logger.mode=disabled", "output_dir=outputs/mine"]
    subprocess.run([python, *words], cwd=clone, env=plain, check=True)
    subprocess.run(
        [python, "scripts/report.py", "outputs/reproduce", "outputs/mine", "page=both.html"],
        cwd=clone,
        env=plain,
        check=True,
    )
    open_all(browser, clone / "both.html")
    names = browser.get("[...document.querySelectorAll('.chip')].map(c => c.textContent)")
    assert len(names) == 6 and {"Hetero", "All-Oblique"} <= set(names) and browser.errors == []
