"""scripts/gpu_check.sh: stages end in time, are resumed, and what they wrote is packed, whatever happens."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace

import pytest
import torch
from conftest import ROOT

from optim import ManifoldMuon
from optim.stack import TWO_ROUNDS
from scripts import gpu_check, gpu_programs, timing
from scripts.bench_predicted import groups_of
from scripts.command import UsageError
from scripts.reproduce import ASSIGNMENTS

SCRIPT = str(ROOT / "scripts" / "gpu_check.sh")


@pytest.fixture
def driver(tmp_path):
    """The shell script with a Python that writes down what it is asked for; stage b sleeps, stage d fails."""
    told = tmp_path / "told"
    fake = tmp_path / "python"
    fake.write_text(
        f'#!/bin/sh\necho "$2" >> {told}\ncase "$2 $*" in "b "*) sleep 60 ;; "d "*) exit 3 ;; data*wrong*) exit 2 ;; esac\n'
    )
    fake.chmod(0o755)

    def start(*words):
        environment = {**os.environ, "PYTHON": str(fake)}
        return subprocess.Popen([SCRIPT, *words], env=environment, stderr=subprocess.PIPE, text=True)

    return start, told


@pytest.mark.parametrize(
    ("words", "code", "asked"),
    [
        (["a"], 0, "a pack"),
        (["a", "c"], 0, "data pack a pack c pack"),
        (["b", "c", "seconds=1"], 124, "data pack b pack c pack"),  # out of time: packed, and on with the next
        (["d", "tiny=true"], 3, "data pack d pack"),
        (["a", "c", "data=wrong"], 2, "data pack"),  # found before the first stage
    ],
)
def test_the_driver_packs_after_every_stage(driver, words, code, asked):
    start, told = driver
    process = start(*words)
    assert process.wait(20) == code
    assert told.read_text().split() == asked.split()


def test_the_driver_packs_when_it_is_stopped(driver):
    start, told = driver
    process = start("b", "c")
    until = time.monotonic() + 10
    while not (told.exists() and "b" in told.read_text().split()) and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    assert told.read_text().split() == ["data", "pack", "b", "pack"]


@pytest.mark.parametrize(("word", "message"), [("e", "is no stage"), ("seconds=soon", "is no whole number")])
def test_the_driver_refuses_what_it_does_not_know(driver, word, message):
    start, told = driver
    process = start(word)
    assert process.wait(20) == 2 and message in process.stderr.read() and not told.exists()


@pytest.fixture
def options(tmp_path):
    """Options of a stage in a folder of the test."""
    places = [f"{key}={tmp_path / key}" for key in ("work", "out", "results")]
    return gpu_check.options_of([*places, "tiny=true", "seconds=60"])[1]


def test_a_stage_ends_its_steps_in_time_and_is_resumed(options, monkeypatch, tmp_path):
    marker = tmp_path / "marker"
    commands = {
        "fine": f"open({str(marker)!r}, 'a').write('x'); print('all is well')",
        "long": "import time; print('begun', flush=True); time.sleep(60)",
        "wrong": "import sys; sys.exit(7)",
    }
    steps = [
        gpu_check.Step(name, [sys.executable, "-c", code], most=1 * (name == "long")) for name, code in commands.items()
    ]
    monkeypatch.setattr(gpu_check, "steps_of", lambda stage, o: steps)
    for _ in range(2):
        assert gpu_check.run_stage("a", options, time.monotonic() + 35) == 1
    assert marker.read_text() == "x"  # done once, passed over then
    fine = gpu_check.Step("fine", [*steps[0].command, "tiny=true"])
    monkeypatch.setattr(gpu_check, "steps_of", lambda stage, o: [fine, *steps[1:]])
    gpu_check.run_stage("a", options, time.monotonic() + 35)
    assert marker.read_text() == "xx"  # with other options, it is another command
    states = json.loads((options.work / "a" / "steps.json").read_text())
    assert {name: state["code"] for name, state in states.items()} == {"fine": 0, "long": 124, "wrong": 7}
    text = (options.out / "summary.txt").read_text()
    assert "a long: out of time" in text and "a wrong: failed with exit code 7" in text and "all is well" in text


def test_what_is_packed_is_small(options):
    for path in ("a/x.log", "runs/adamw/metrics.jsonl", "runs/adamw/checkpoints/step_1/weights"):
        (options.work / path).parent.mkdir(parents=True, exist_ok=True)
        (options.work / path).write_text("x")
    (options.work / "a" / "steps.json").write_text('{"train": {"note": "done", "seconds": 1}}')
    options.results.mkdir()
    for table in ("bench_train.md", "bench_optimizer.md"):  # the second is of another day
        (options.results / table).write_text("x")
    gpu_check.pack(options)
    assert {p.name for p in options.out.iterdir()} == {"summary.txt", "a.tar.gz", "runs.tar.gz", "results.tar.gz"}
    with tarfile.open(options.out / "runs.tar.gz") as archive:
        assert [m.name for m in archive.getmembers() if m.isfile()] == ["runs/adamw/metrics.jsonl"]
    with tarfile.open(options.out / "results.tar.gz") as archive:
        assert archive.getnames() == [f"results/{timing.device_folder()}/bench_train.md"]


def test_a_benchmark_ends_before_it_is_stopped(options, monkeypatch):
    """It is told fewer seconds than it has, whatever is left of the stage, and is not started with too few."""
    tell = [sys.executable, "-c", "import os, sys; print(sys.argv, os.environ.get('TOLD'))"]
    names = ("first", "second", "third")
    steps = [gpu_check.Step(name, tell, 250, 90, "limit_s", 60, {"TOLD": "yes"}) for name in names]
    now = [0.0]
    monkeypatch.setattr(gpu_check.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(gpu_check, "steps_of", lambda stage, o: steps)
    monkeypatch.setattr(gpu_check, "pack", lambda o: now.__setitem__(0, now[0] + 150))
    assert gpu_check.run_stage("a", options, end=360.0) == 1  # each takes 150
    told = [(options.work / "a" / f"{name}.log").read_text() for name in ("first", "second")]
    assert "'limit_s=190'" in told[0] and "'limit_s=150'" in told[1] and all("yes" in text for text in told)
    assert json.loads((options.work / "a" / "steps.json").read_text())["third"]["note"] == "not reached"


def test_every_benchmark_that_has_a_limit_is_told_one(options):
    """Those that have none stop by themselves."""
    found = {
        step.name: step for stage in "ab" for step in gpu_check.steps_of(stage, options) if "bench" in step.command[1]
    }
    assert len(found) == 8
    for name, step in found.items():
        assert step.limit == ("" if name in ("ceilings", "probes", "profile") else "limit_s"), name
        assert 0 < step.fewest < step.most and (not step.limit or 0 < step.beside < step.fewest)


def test_the_programs_compiled_beforehand_are_those_of_all_assignments():
    """Every stack of equally shaped matrices, with its manifold, is in one of the updates."""
    compiled = {stack for name in gpu_programs.UPDATES for stack in groups_of(name).items()}
    assert all(set(groups_of(name).items()) <= compiled for name in ASSIGNMENTS)


def test_a_program_that_is_not_compiled_is_named(monkeypatch, capsys, tmp_path):
    """The others are compiled."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # whose choices between kernels are removed at the end
    part = "import sys; sys.exit('only=hetero' in sys.argv)"
    started = []

    def start(command):
        started.append(command[-1])
        return subprocess_popen([sys.executable, "-c", part, command[-1]])

    subprocess_popen = subprocess.Popen
    monkeypatch.setattr(gpu_programs.subprocess, "Popen", start)
    assert gpu_programs.main(["tiny=true"]) == 1
    assert len(started) == 5 and "failed, see above: hetero\n" in capsys.readouterr().out


def test_choices_between_kernels_are_forgotten(monkeypatch, tmp_path):
    """What was timed beside other processes is timed again; what was compiled stays."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    (tmp_path / "ab").mkdir()
    for name in ("kernel.best_config", "kernel.py"):
        (tmp_path / "ab" / name).write_text("x")
    gpu_programs.forget_choices()
    assert [file.name for file in (tmp_path / "ab").iterdir()] == ["kernel.py"]


@pytest.mark.parametrize("part", ["hetero", "model", "residual"])
def test_a_part_is_compiled_with_what_training_needs(part, monkeypatch):
    """A second round of the retraction, and an evaluation."""
    rounds, modes = [], []
    monkeypatch.setattr(gpu_programs.RandomTraining, "step", lambda self: modes.append(self.model.training))
    monkeypatch.setattr(gpu_programs.RandomTraining, "forward", lambda self: modes.append(self.model.training))
    monkeypatch.setattr(ManifoldMuon, "update", lambda self, highest: rounds.extend(highest))
    gpu_programs.compile_part(part, 1, tiny=True, for_training=True)
    assert {*rounds} == ({TWO_ROUNDS} if part == "hetero" else set())
    assert modes == {"hetero": [], "model": [True, False], "residual": [True] * 13}[part]


def test_a_stage_asks_for_a_gpu(monkeypatch, tmp_path, capsys):
    """It would otherwise measure a CPU for ten minutes."""
    places = [f"{key}={tmp_path / key}" for key in ("work", "out", "results")]
    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_check, "run_stage", lambda stage, o, end: round(end - gpu_check._STARTED))
    monkeypatch.chdir(tmp_path)
    for word in ("c", "data"):
        assert gpu_check.main([word, *places]) == 2 and "finds no GPU here" in capsys.readouterr().err
    assert gpu_check.main(["c", "tiny=true", "seconds=100", *places]) == 75  # 25 to end, from the start of the process
    assert gpu_check.main(["environment"]) == 0


def test_every_command_of_every_stage_is_well_formed(options):
    full = gpu_check.options_of(["data=text", "data.name=mine"])[1]
    for o in (options, full):
        for stage in gpu_check.STAGES:
            steps = gpu_check.steps_of(stage, o)
            assert len({step.name for step in steps}) == len(steps)
            assert all((ROOT / step.command[1]).exists() or step.command[1] == "-m" for step in steps)
    assert "data.name=mine" in gpu_check.steps_of("c", full)[-1].command
    assert [step.name for step in gpu_check.steps_of("c", full)] == ["programs", "runs"]
    with pytest.raises(UsageError, match="tiny=1 must be true or false"):
        gpu_check.options_of(["tiny=1"])


def test_single_steps_can_be_chosen(options, monkeypatch):
    monkeypatch.setattr(gpu_check, "run_step", lambda step, *_: {"code": 0, "seconds": 1.0, "note": "done"})
    words = [f"{key}={getattr(options, key)}" for key in ("work", "out", "results")]
    chosen = gpu_check.options_of([*words, "steps=probes,optimizer"])[1]
    for stage in "ab":
        assert gpu_check.run_stage(stage, chosen, time.monotonic() + 100) == 0
    assert [*gpu_check.states_of(options.work / "a")] == ["optimizer"]
    assert [*gpu_check.states_of(options.work / "b")] == ["probes"]
    with pytest.raises(UsageError, match="there is no step probe; the steps are environment, ceilings"):
        gpu_check.options_of(["steps=probe"])


def test_a_step_that_never_ended_is_named(options, monkeypatch):
    def killed(*_):
        raise SystemExit(143)

    monkeypatch.setattr(gpu_check, "run_step", killed)
    with pytest.raises(SystemExit):
        gpu_check.run_stage("a", options, time.monotonic() + 100)
    assert "a environment: stopped" in gpu_check.summary_of(options)


def test_what_has_a_bar_is_measured_first(options):
    steps = gpu_check.steps_of("b", replace(options, tiny=False))
    assert [step.name for step in steps[:4]] == ["programs", "train", "residual", "probes"]
    assert any(word.startswith("assignments=adamw,hetero,") for word in steps[1].command)


def test_what_a_torch_cannot_show_is_not_measured(options, monkeypatch):
    """AdamW has one step rule, so it is not measured again under the published one."""
    for version, more in (("2.11.0+cu130", 0), ("2.13.0", 1)):
        monkeypatch.setattr(gpu_check.torch, "__version__", torch.torch_version.TorchVersion(version))
        steps = {step.name: step.command for step in gpu_check.steps_of("b", replace(options, tiny=False))}
        [word] = [word for word in steps["bench_train_options"] if word.startswith("variants=")]
        assert word.count("model.stream_dtype=bfloat16") == more and "capture=true" in word
        assert not any("adamw" in word for word in steps["bench_train_published"])


def test_a_mistake_in_the_data_is_found_before_the_first_stage(options, monkeypatch, tmp_path, capsys):
    places = [f"{key}={tmp_path / key}" for key in ("work", "out", "results")]
    monkeypatch.chdir(tmp_path)
    assert (
        gpu_check.main(["data", "tiny=true", "data=books", "data.files=none.gz", f"data.dir={tmp_path}/books", *places])
        == 2
    )
    told = capsys.readouterr().err
    assert "no file matches 'none.gz'" in told and "give data=text data.name=... data.files=..." in told
    (tmp_path / "two.txt").write_text("one\n<|endoftext|>\ntwo " * 50)
    words = ["data=text", "data.name=two", f"data.files={tmp_path}/two.txt", "data.val_fraction=0.5"]
    words += ["data.tokenizer=bytes", f"data.dir={tmp_path}/prepared"]
    assert gpu_check.main(["data", "tiny=true", *words, *places]) == 0 and (tmp_path / "prepared").is_dir()
    assert "data=stdlib" in gpu_check.runs_words(options) and not (tmp_path / "work").exists()


def test_a_command_that_does_not_end_is_killed_even_if_the_stage_is_stopped_meanwhile(monkeypatch):
    ready = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", ready], stdout=subprocess.PIPE, start_new_session=True)
    process.stdout.readline()
    monkeypatch.setattr(process, "wait", lambda patience: sys.exit(143))
    with pytest.raises(SystemExit):
        gpu_check._end(process)
    assert subprocess.Popen.wait(process, 10) == -signal.SIGKILL


def test_a_test_that_passed_is_left_out_next_time(pytester_folder):
    """The ledger has a line for each test, at once. When no test is left, all passed."""
    ledger, run = pytester_folder
    assert run() == 1
    found = {r["test"].rpartition("::")[2]: r for r in map(json.loads, ledger.read_text().splitlines())}
    assert found["test_fine"]["outcome"] == "passed" and "assert 1 == 2" in found["test_wrong"]["why"]
    tests = ledger.parent / "test_two.py"
    tests.write_text(tests.read_text().replace("1 == 2", "1 == 1"))
    assert run() == run() == 0
    assert [json.loads(line)["test"].rpartition("::")[2] for line in ledger.read_text().splitlines()] == [
        "test_fine",
        "test_wrong",
        "test_wrong",
    ]


@pytest.fixture
def pytester_folder(tmp_path):
    """A folder with two tests, one of which fails: its ledger, and a function that runs them."""
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "ledger.py").read_text())
    (tmp_path / "test_two.py").write_text("def test_fine():\n    pass\n\n\ndef test_wrong():\n    assert 1 == 2\n")
    ledger = tmp_path / "ledger.jsonl"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--ledger={ledger}", "."]
    environment = {**os.environ, "PYTHONPATH": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return (
        ledger,
        lambda: subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False).returncode,
    )


def test_contestants_that_compile_too_long_are_left_out(monkeypatch):
    """The others are timed in the rest of the time."""
    now, compiled = [0.0], set()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def call(name):
        now[0] += 1 if name in compiled else 45
        compiled.add(name)

    times = timing.take_turns({n: lambda n=n: call(n) for n in "abc"}, repeats=3, warmup=2, limit_s=100)
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 3, "b": 3, "c": 0}


PEAKS = """
import torch
from scripts import timing
held = torch.ones(2**20)
print([timing.peak_bytes(lambda n=n: torch.ones(n * 2**18).sum(), [held]) for n in (10, 300, 10)])
"""


KERNEL_COUNTS = os.access("/proc/self/clear_refs", os.W_OK)
NOT_COUNTED = "the kernel does not count the peak of a process anew"


@pytest.mark.skipif(not (torch.cuda.is_available() or KERNEL_COUNTS), reason=NOT_COUNTED)
def test_a_row_has_its_own_peak():
    """Not that of the largest one before it. In a process of its own, as a benchmark is: this one may hold freed memory."""
    peaks = json.loads(subprocess.check_output([sys.executable, "-c", PEAKS], cwd=ROOT, text=True))
    for peak, expected in zip(peaks, (14, 304, 14)):
        assert peak / 2**20 == pytest.approx(expected, abs=6)


@pytest.mark.skipif(not KERNEL_COUNTS, reason=NOT_COUNTED)
def test_a_peak_counts_each_tensor_once_and_whole(monkeypatch):
    """Two parts of one tensor, and another; the momentum of alike matrices is one tensor, of which a state is a part."""
    monkeypatch.setattr(timing.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(timing, "_status", lambda key: 0)
    whole, other = torch.ones(8, 100), torch.ones(7)
    assert timing.peak_bytes(lambda: None, [whole[0], whole[3], other]) == 4 * 807


def test_what_is_compiled_is_timed_once_even_after_the_limit(monkeypatch):
    """The last compilation began in time, and ended late."""
    now, compiled = [0.0], set()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def call(name):
        now[0] += 1 if name in compiled else 70
        compiled.add(name)

    times = timing.take_turns({n: lambda n=n: call(n) for n in "ab"}, repeats=3, limit_s=100)
    assert times == {"a": [1], "b": [1]}


def test_contestants_stop_at_the_limit(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def take(seconds):
        now[0] += seconds

    times = timing.take_turns({"quick": lambda: take(1), "slow": lambda: take(50)}, repeats=5, warmup=0, limit_s=60)
    assert len(times["quick"]) == 2 and len(times["slow"]) == 2
    assert timing.median([]) == "not measured"


@pytest.mark.campaign
@pytest.mark.timeout(900)
def test_all_of_it_in_small(tmp_path):
    """Every stage, every command, on whatever device there is; then again, when everything is done before."""
    places = [f"{key}={tmp_path / key}" for key in ("work", "out", "results")]
    command = [SCRIPT, "tiny=true", *places, f"data.dir={tmp_path}/data", "data=stdlib"]
    environment = {**os.environ, "PYTHON": sys.executable}
    for _ in range(2):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("done before") == 15
    assert len(list((tmp_path / "out").iterdir())) <= 8
    for name in ("ceilings", "optimizer", "train", "train_published", "train_options", "profile", "residual", "probes"):
        assert "|" in (tmp_path / "results" / f"bench_{name}.md").read_text()
    table = (tmp_path / "results" / "assignments" / "table.md").read_text()
    assert table.count("| ok |") == 6 and "tokens/s" in table
