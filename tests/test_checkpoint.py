"""Checkpoints: whatever happens to the process, the disk or the bytes, what loads is what was saved."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import re
import resource
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch

from training import checkpoint
from training.checkpoint import MANIFEST_FILE, STATE_FILE, CheckpointError, discard_later, load, load_newest, save
from training.sharded_tensors import sha256


def make_state(step: int) -> dict:
    """A state with one of everything that a run saves; its numbers tell the step."""
    generator = torch.Generator().manual_seed(step)
    return {
        "model": OrderedDict(weight=torch.randn(7, 5, generator=generator), half=torch.full((3,), step).bfloat16()),
        "optimizer": {
            "state": {0: {"momentum": torch.randn(7, 5, generator=generator), "step": step}},
            "lr": [0.1, None],
        },
        "rng": [generator.get_state(), (3, (1, 2, 3), None)],
        "best": float("inf"),
        "name": f"run {step}",
    }


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def holds(loaded, step: int) -> bool:
    return loaded is not None and loaded.step == step and same(loaded.state, make_state(step))


def test_what_loads_is_what_was_saved(tmp_path):
    path = save(tmp_path / "new" / "checkpoints", 100, make_state(100), metric=2.5)
    assert path == tmp_path / "new" / "checkpoints" / "step_00000100"
    assert holds(load(path), 100)
    newest = load_newest(path.parent)
    assert holds(newest, 100) and newest.path == path and newest.metric == 2.5 and newest.skipped == []


def test_no_checkpoint_is_none_and_a_wrong_path_names_the_right_one(tmp_path):
    assert load_newest(tmp_path) is None
    assert load_newest(tmp_path / "absent") is None
    with pytest.raises(CheckpointError, match=r"not a checkpoint .*in the folder checkpoints of a run"):
        load(tmp_path / "absent")
    save(tmp_path / "checkpoints", 5, make_state(5))
    (tmp_path / "checkpoints" / ".step_00000010.replaced").mkdir()
    for wrong in (".", "checkpoints", "checkpoints/step_5"):
        with pytest.raises(CheckpointError, match=r"did you mean .*checkpoints/step_00000005\?"):
            load(tmp_path / wrong)


def test_of_equally_good_checkpoints_the_newest_stays(tmp_path):
    for step, metric in ((1, 1.0), (2, 1.0), (3, 2.0)):
        save(tmp_path, step, {"x": 1}, keep=1, metric=metric)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000002", "step_00000003"]


def test_the_newest_k_and_the_best_stay(tmp_path):
    metrics = [5.0, 2.0, 4.0, float("nan"), 3.0, None, 2.5]
    for step, metric in enumerate(metrics):
        save(tmp_path, step, make_state(step), keep=2, metric=metric)
        finite = [s for s in range(step + 1) if metrics[s] is not None and metrics[s] == metrics[s]]
        expected = {step, max(step - 1, 0), min(finite, key=lambda s: metrics[s])}
        assert names(tmp_path) == [f"step_{s:08d}" for s in sorted(expected)]
        assert all(holds(load(tmp_path / f"step_{s:08d}"), s) for s in expected)
    with pytest.raises(CheckpointError, match="keep=0"):
        save(tmp_path, 9, make_state(9), keep=0)


def test_a_future_that_was_given_up_goes_when_its_past_continues(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step, make_state(step), keep=5, metric=1.0 / step)
    save(tmp_path, 15, make_state(15), keep=2, metric=9.0)
    assert names(tmp_path) == ["step_00000010", "step_00000015"]


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 1, make_state(1))
    save(tmp_path, 2, make_state(1))
    save(tmp_path, 2, make_state(2))
    assert names(tmp_path) == ["step_00000001", "step_00000002"]
    assert holds(load_newest(tmp_path), 2)


def test_a_checkpoint_comes_before_the_one_that_it_replaces(tmp_path):
    old = save(tmp_path / "before", 20, make_state(19))
    shutil.copytree(old, tmp_path / ".step_00000020.replaced")
    shutil.copytree(save(tmp_path / "after", 20, make_state(20)), tmp_path / "step_00000020")
    assert holds(load_newest(tmp_path), 20)


def test_checkpoints_after_a_step_have_names_that_are_not_read_before_they_are_removed(two, monkeypatch):
    shutil.copytree(two, two.with_name(f".{two.name}.replaced"))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_remove", lambda path: None)  # as if killed there
        discard_later(two.parent, 10)
    doomed = [".step_00000020.removed.tmp", ".step_00000020.replaced.removed.tmp"]
    assert names(two.parent) == [*doomed, "step_00000010"]
    assert holds(load_newest(two.parent), 10)


def test_a_digest_is_that_of_all_bytes(tmp_path):
    content = bytes(1 << 22) + b"and more than is read at once"
    (tmp_path / "file").write_bytes(content)
    assert sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


# ---- damage ----


@pytest.fixture
def two(tmp_path) -> Path:
    save(tmp_path, 10, make_state(10))
    return save(tmp_path, 20, make_state(20))


def assert_falls_back(path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"use an older|not a checkpoint"):
        load(path)
    loaded = load_newest(path.parent)
    assert holds(loaded, 10)
    assert [skipped for skipped, _ in loaded.skipped] == [path]
    assert str(path) in loaded.skipped[0][1]


def places(size: int, count: int) -> list[int]:
    """``count`` offsets over a file, both ends included."""
    return sorted({round(index * (size - 1) / (count - 1)) for index in range(count)})


@pytest.mark.parametrize("file", [STATE_FILE, MANIFEST_FILE])
def test_a_truncation_anywhere_is_detected(two, file):
    whole = (two / file).read_bytes()
    for length in places(len(whole), 50):
        (two / file).write_bytes(whole[:length])
        assert_falls_back(two)
    (two / file).write_bytes(whole + b"\n")
    assert_falls_back(two)
    (two / file).write_bytes(whole)
    assert holds(load_newest(two.parent), 20)


@pytest.mark.parametrize("file", [STATE_FILE, MANIFEST_FILE])
def test_a_flipped_bit_anywhere_is_detected(two, file):
    whole = (two / file).read_bytes()
    for number, place in enumerate(places(len(whole), 50)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << number % 8
        (two / file).write_bytes(flipped)
        assert_falls_back(two)


def test_every_bit_of_the_manifest_counts(two):
    whole = (two / MANIFEST_FILE).read_bytes()
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        (two / MANIFEST_FILE).write_bytes(flipped)
        with pytest.raises(CheckpointError, match="damaged"):
            load(two)


def test_a_manifest_reformatted_or_of_another_shape_is_refused(two):
    fields = json.loads((two / MANIFEST_FILE).read_bytes())
    for other in (fields, [fields], {**fields, "extra": 1}, {"checksum": fields["checksum"]}, 3):
        (two / MANIFEST_FILE).write_text(json.dumps(other))
        assert_falls_back(two)


@pytest.mark.parametrize("file", [STATE_FILE, MANIFEST_FILE])
def test_a_missing_file_is_detected(two, file):
    (two / file).unlink()
    assert_falls_back(two)
    with pytest.raises(CheckpointError, match=rf"not a checkpoint \({file}: .*; use an older checkpoint"):
        load(two)


def test_files_of_another_checkpoint_are_detected(two):
    shutil.copy(two.parent / "step_00000010" / STATE_FILE, two / STATE_FILE)
    assert_falls_back(two)


def test_only_damaged_ones_left_is_an_error_not_a_fresh_start(two):
    for path in (two, two.parent / "step_00000010"):
        (path / STATE_FILE).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"none of the 2 .*restore one from a copy") as error:
        load_newest(two.parent)
    assert "step_00000010" in str(error.value) and "step_00000020" in str(error.value)


@pytest.mark.parametrize("name", ["step_99999999", "step_00000015", ".step_00000030.replaced"])
def test_a_checkpoint_under_another_steps_name_is_not_taken_for_it(two, name):
    shutil.copytree(two, two.with_name(name))
    with pytest.raises(CheckpointError, match=r"holds the checkpoint of step 20: it was renamed"):
        load(two.with_name(name))
    assert holds(load_newest(two.parent), 20)
    shutil.copytree(two, two.with_name("a_copy_with_a_name_of_its_own"))
    assert holds(load(two.with_name("a_copy_with_a_name_of_its_own")), 20)
    save(two.parent, 30, make_state(30), keep=1)
    assert holds(load_newest(two.parent), 30)


MANIFESTS = {
    "nested": b"[" * 100_000,
    "nested inside": b'{"checksum": "", "step": ' + b"[" * 100_000,
    "empty": b"",
    "text for a step": {"step": "20"},
    "text for a size": {"size": "many"},
    "text for a metric": {"metric": "low"},
    "true for a step": {"step": True},
}


@pytest.mark.parametrize("content", MANIFESTS.values(), ids=MANIFESTS)
def test_no_manifest_keeps_older_checkpoints_from_being_found(two, content):
    if isinstance(content, dict):
        fields = {k: v for k, v in json.loads((two / MANIFEST_FILE).read_bytes()).items() if k != "checksum"}
        content = checkpoint._Manifest(**{**fields, **content}).render()
    (two / MANIFEST_FILE).write_bytes(content)
    assert_falls_back(two)
    save(two.parent, 30, make_state(30), keep=2, metric=1.0)
    assert holds(load_newest(two.parent), 30)


@pytest.mark.parametrize("state", [[1, 2], torch.zeros(3), None], ids=lambda state: type(state).__name__)
def test_a_state_that_is_no_dict_is_named(two, state):
    torch.save(state, two / STATE_FILE)
    raw = (two / STATE_FILE).read_bytes()
    manifest = checkpoint._Manifest(20, None, len(raw), checkpoint.hashlib.sha256(raw).hexdigest())
    (two / MANIFEST_FILE).write_bytes(manifest.render())
    with pytest.raises(CheckpointError, match=rf"state\.pt holds a {type(state).__name__} instead of a run's state"):
        load(two)
    assert holds(load_newest(two.parent), 10)


def test_files_at_our_hidden_names_do_not_stop_a_save(two):
    for name in (".step_00000030.tmp", ".step_00000010.removed.tmp"):
        (two.parent / name).write_text("left by something")
    (two.parent / ".step_00000020.tmp").symlink_to(two.parent.parent)
    save(two.parent, 30, make_state(30), keep=2)
    assert names(two.parent) == ["step_00000020", "step_00000030"] and two.parent.parent.is_dir()


@pytest.mark.parametrize("place", [".", "file", "file/checkpoints"])
def test_a_file_in_the_way_is_named_and_left_alone(two, place):
    blocker = two.parent / ("step_00000030" if place == "." else "file")
    blocker.write_text("mine")
    with pytest.raises(CheckpointError, match=rf"{blocker} is in the way: move it elsewhere") as error:
        save(two.parent / place, 30, make_state(30))
    assert not re.search("free space|remove|delete", str(error.value))
    save(two.parent, 25, make_state(25), keep=3)
    assert blocker.read_text() == "mine" and holds(load_newest(two.parent), 25)


def test_a_visibly_damaged_one_is_not_counted_as_kept(two):
    (two / STATE_FILE).write_bytes(b"short")
    save(two.parent, 30, make_state(30), keep=2)
    assert names(two.parent) == ["step_00000010", "step_00000030"]


# ---- what is refused ----


class Bomb:
    """Pickles to a call that leaves a file behind when it is executed."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "bare pickle"])
def test_a_pickle_bomb_with_a_proper_manifest_is_not_executed(two, tmp_path, legacy):
    crater = tmp_path / "crater"
    if legacy:
        (two / STATE_FILE).write_bytes(pickle.dumps(Bomb(crater), protocol=2))
    else:
        torch.save({"model": Bomb(crater)}, two / STATE_FILE)
    raw = (two / STATE_FILE).read_bytes()
    manifest = checkpoint._Manifest(20, None, len(raw), checkpoint.hashlib.sha256(raw).hexdigest())
    (two / MANIFEST_FILE).write_bytes(manifest.render())

    with pytest.raises(CheckpointError, match="nothing in it was executed"):
        load(two)
    assert holds(load_newest(two.parent), 10)
    assert not crater.exists()
    pickle.loads(pickle.dumps(Bomb(crater)))
    assert crater.exists(), "the bomb itself must work, or this test shows nothing"


@pytest.mark.parametrize(
    "foreign",
    [numpy.float64(1.0), numpy.zeros(2), Path("x"), {1, 2}, object, 1j],
    ids=lambda value: type(value).__name__,
)
def test_what_could_not_be_loaded_is_refused_before_it_is_saved(tmp_path, foreign):
    with pytest.raises(CheckpointError, match=r"state\['a'\]\[1\] is a .*; turn it into"):
        save(tmp_path / "sub", 1, {"a": [0, foreign]})
    assert not (tmp_path / "sub").exists()


@pytest.mark.parametrize("key", [numpy.int64(3), Path("x")], ids=lambda key: type(key).__name__)
def test_a_key_that_could_not_be_loaded_is_refused_too(tmp_path, key):
    with pytest.raises(CheckpointError, match=r"the key .* of state\['a'\] is a .*; turn it into"):
        save(tmp_path / "sub", 1, {"a": {key: 0}})
    assert not (tmp_path / "sub").exists()


# ---- faults while saving ----


def interrupt_at(monkeypatch, number: int, interruption: Callable[[], None]) -> list[int]:
    """Call ``interruption`` instead of the ``number``-th call of a save that changes the disk; returns the counter."""
    calls = [0]

    def counted(function):
        def call(*args, **kwargs):
            calls[0] += 1
            if calls[0] == number:
                interruption()
            return function(*args, **kwargs)

        return call

    class CountedFile:
        def __init__(self, file):
            self._file, self.write = file, counted(file.write)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self._file.close()

        def __getattr__(self, name):
            return getattr(self._file, name)

    plain_open = Path.open

    def path_open(path, mode="r", **kwargs):
        file = plain_open(path, mode, **kwargs)
        return CountedFile(file) if "w" in mode else file

    monkeypatch.setattr(Path, "open", path_open)
    for name in ("fsync", "replace", "mkdir", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    return calls


def full_disk() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("step", [20, 30], ids=["again", "new"])
def test_a_full_disk_at_any_call_leaves_the_older_checkpoints(tmp_path, monkeypatch, step):
    failures, number, reached = 0, 0, True
    while reached:
        number += 1
        directory = tmp_path / str(number)
        save(directory, 10, make_state(10))
        save(directory, 20, make_state(20))
        with monkeypatch.context() as patch:
            calls = interrupt_at(patch, number, full_disk)
            try:
                save(directory, step, make_state(step), keep=2)
            except CheckpointError as error:
                failures += 1
                assert "No space left" in str(error) and "free space" in str(error)
                found = re.search(r"resume=(\S+) output_dir=<another>", str(error))
                assert found and load(found[1]).step == load_newest(directory).step
                assert not (directory / f".step_{step:08d}.tmp").exists(), "a failed save gives its space back"
            reached = calls[0] >= number
        newest = load_newest(directory)
        assert (holds(newest, 20) or holds(newest, step)) and newest.skipped == []
        save(directory, 40, make_state(40), keep=1)
        assert names(directory) == ["step_00000040"]
    assert holds(newest, step), "the last round met no fault"
    assert failures > 20


def test_all_of_it_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(Path(os.readlink(f"/proc/self/fd/{fd}"))), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda old, new: (events.append((old, new)), rename(old, new)))
    final = save(tmp_path, 10, make_state(10))
    temp = tmp_path / ".step_00000010.tmp"
    assert events == [temp / STATE_FILE, temp / MANIFEST_FILE, temp, (temp, final), tmp_path]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_file_system_may_be_unable_to_sync_a_directory_but_not_fail_at_it(tmp_path, monkeypatch, code):
    plain = os.fsync

    def fsync(descriptor):
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")).is_dir():
            raise OSError(code, os.strerror(code))
        plain(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    if code == errno.EIO:
        with pytest.raises(CheckpointError, match=os.strerror(code)):
            save(tmp_path, 10, make_state(10))
    else:
        assert holds(load(save(tmp_path, 10, make_state(10))), 10)


def test_a_checkpoint_that_stepped_aside_for_one_that_never_came_returns(two, monkeypatch):
    """Killed between the two renames of a replacement; then the next save fails, and the one after succeeds."""
    os.rename(two, two.with_name(f".{two.name}.replaced"))
    assert holds(load_newest(two.parent), 20)
    with monkeypatch.context() as patch, pytest.raises(CheckpointError):
        patch.setattr(os, "fsync", lambda _: full_disk())
        save(two.parent, 30, make_state(30), keep=2)
    assert holds(load_newest(two.parent), 20)
    save(two.parent, 30, make_state(30), keep=2)
    assert names(two.parent) == ["step_00000020", "step_00000030"] and holds(load(two), 20)


def test_a_file_that_cannot_grow_is_reported_by_its_cause(tmp_path):
    """The same from the operating system itself, through torch's zip writer."""
    save(tmp_path, 1, make_state(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointError, match="File too large; free space"):
            save(tmp_path, 2, {"weight": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["step_00000001"] and holds(load_newest(tmp_path), 1)


def save_and_die(monkeypatch, directory: Path, step: int, number: int) -> bool:
    """Save in a child that goes, as by kill -9, before its ``number``-th change of the disk; True if it got there."""
    child = os.fork()
    if child == 0:
        try:
            interrupt_at(monkeypatch, number, lambda: os._exit(9))
            save(directory, step, make_state(step), keep=1)
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("step", [20, 30], ids=["again", "new"])
def test_killed_at_any_moment_a_save_leaves_a_good_checkpoint(tmp_path, monkeypatch, step):
    number, killed = 0, True
    while killed:
        number += 1
        directory = tmp_path / str(number)
        save(directory, 20, make_state(20 if step == 30 else 19), keep=1)
        killed = save_and_die(monkeypatch, directory, step, number)
        newest = load_newest(directory)
        old = newest.step == 20 and same(newest.state, make_state(20 if step == 30 else 19))
        assert (old or holds(newest, step)) and newest.skipped == [], f"killed at change {number}"
        for name in names(directory):
            assert name.startswith(".") or load(directory / name), "a final name never stands for half a checkpoint"
        save(directory, 40, make_state(40), keep=1)
        assert names(directory) == ["step_00000040"], "what the killed save left is cleared by the next"
    assert not old and number > 30
