"""Sharded over two ranks, a run is the run of DDP bit by bit: weights, records, checkpoints."""

import json
import os
import pickle
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from harness import final_state, finish, free_port, records, same, start_ranks, train_all
from torch.distributed.tensor import DTensor

from train import train
from training.build import build
from training.checkpoint import CheckpointError, load, load_newest, save_sharded
from training.checks import check
from training.config import compose
from training.placement import Replicated, place
from training.ranks import Ranks
from training.shard import Sharded
from training.sharded_tensors import read_shards, write_shards
from training.step import clip
from training.validate import ConfigError

# Every rank computes its windows at once and the clip does not act, so all sums are DDP's. Five evaluation windows: three turns.
RUN = [
    *("model.n_layer=2", "model.n_head=2", "model.n_embd=16", "model.block_size=16", "global_batch_tokens=64"),
    *("micro_batch_size=2", "grad_clip=null", "max_steps=4", "eval_interval=4", "eval_windows=5", "full_eval=false"),
    *("log.interval=1", "log.interval_spectra=4", "checkpoint.interval=2", "schedule.warmup_steps=2"),
    *("logger.mode=disabled", "device=cpu", "launcher.shard=fsdp"),
]
MIXED = ["assignment=custom", "assignment.rules={attn: euclidean, c_fc: dgram, mlp.c_proj: adamw}", "dtype=bfloat16"]
MIXED += ["attention=qk_clip", "attention.qk_clip=1e-3", "checkpoint.keep=1"]
SCALARS_THAT_BREAK = ["residual=p_sphere", "optim.adamw.lr=1e15"]  # after the first update, nothing is finite


@pytest.fixture(scope="module")
def folder(tiny_data, tmp_path_factory):
    """A folder with runs, by name, that two ranks have trained one after the other."""
    folder = tmp_path_factory.mktemp("sharded")
    ddp, broken = "launcher.shard=ddp", [*MIXED, *SCALARS_THAT_BREAK]
    runs = {
        "ddp": [ddp],
        "fsdp": [],
        "fsdp_from_fsdp": [f"resume={folder}/fsdp/checkpoints/step_00000002"],
        "fsdp_from_ddp": [f"resume={folder}/ddp/checkpoints/step_00000002"],
        "ddp_from_fsdp": [f"resume={folder}/fsdp/checkpoints/step_00000002", ddp],
        "one_step": ["max_steps=1"],
        "mixed_ddp": [*broken, ddp],
        "mixed_fsdp": broken,
    }
    cfgs = [compose([*tiny_data, *RUN, *extra, f"output_dir={folder}/{name}"]) for name, extra in runs.items()]
    output = folder / "output.txt"
    codes = finish(start_ranks(2, train_all, cfgs, [free_port() for _ in cfgs], output=str(output)), timeout=400)
    assert codes == [0, 0], output.read_text()
    return folder


def alike(one, other):
    """Whether two runs have the same state and records to the bit, but for the last bits of recorded gradient norms."""
    a, b = final_state(one), final_state(other)
    shared = a["model"].keys() & b["model"].keys()  # a sharded checkpoint has no second names of tied weights
    assert a["model"].keys() ^ b["model"].keys() <= {"lm_head.weight"}
    weights = all(torch.equal(a["model"][name], b["model"][name]) for name in shared)
    told = [[{k: v for k, v in r.items() if k != "grad_norm"} for r in records(run)] for run in (one, other)]
    return weights and len(shared) > 10 and same(a["optimizers"], b["optimizers"]) and told[0] == told[1]


@pytest.mark.timeout(450)
def test_sharded_is_ddp_to_the_bit(folder):
    assert alike(folder / "ddp", folder / "fsdp")
    norms = [[r["grad_norm"] for r in records(folder / name) if r["kind"] == "train"] for name in ("ddp", "fsdp")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    metrics = [load_newest(folder / name / "checkpoints").metric for name in ("ddp", "fsdp")]
    assert metrics[0] == metrics[1] is not None


@pytest.mark.timeout(450)
def test_bfloat16_scalars_split_matrices_and_skipped_updates(folder):
    assert alike(folder / "mixed_ddp", folder / "mixed_fsdp")
    skipped = [r["skipped_updates"] for r in records(folder / "mixed_fsdp") if r["kind"] == "train"]
    assert skipped[0] == 0 and skipped[-1] > 0
    first = [next(r for r in records(folder / f"mixed_{name}") if r["kind"] == "train") for name in ("ddp", "fsdp")]
    assert first[0]["grad_norm"] == pytest.approx(first[1]["grad_norm"], rel=1e-6)
    assert [path.name for path in (folder / "mixed_fsdp/checkpoints").iterdir()] == ["step_00000004"]


@pytest.mark.timeout(450)
def test_checkpoints_resume_either_way(folder, tiny_data, tmp_path):
    expected = final_state(folder / "fsdp")
    for name in ("fsdp_from_fsdp", "fsdp_from_ddp", "ddp_from_fsdp"):
        found = final_state(folder / name)
        for key in expected["model"]:
            assert torch.equal(found["model"][key], expected["model"][key]), (name, key)
        assert same(found["optimizers"], expected["optimizers"]), name
    start = f"resume={folder}/fsdp/checkpoints/step_00000002"
    train(compose([*tiny_data, *RUN, start, f"output_dir={tmp_path}/alone"]))  # one rank, which is not sharded
    alone = final_state(tmp_path / "alone")
    for key, W in expected["model"].items():
        assert torch.allclose(alone["model"][key], W, atol=1e-5), key


@pytest.mark.timeout(450)
def test_a_checkpoint_of_two_ranks_resumes_on_four(folder, tiny_data, tmp_path):
    start = f"resume={folder}/fsdp/checkpoints/step_00000002"
    cfg = compose([*tiny_data, *RUN, start, f"output_dir={tmp_path}/four"])
    output = tmp_path / "output.txt"
    assert finish(start_ranks(4, train_all, [cfg], [free_port()], output=str(output)), timeout=200) == [0] * 4, (
        output.read_text()
    )
    expected, four = final_state(folder / "fsdp"), final_state(tmp_path / "four")
    for key, W in expected["model"].items():
        assert torch.allclose(four["model"][key], W, atol=1e-5), key


@pytest.mark.timeout(450)
def test_a_step_of_two_ranks_is_that_of_one(folder, tiny_data, tmp_path):
    """Gradients, and what AdamW updates, to the bit. A batched product of one matrix rounds otherwise than that of two."""
    train(compose([*tiny_data, *RUN, "max_steps=1", f"output_dir={tmp_path}/alone"]))
    alone, both = final_state(tmp_path / "alone"), final_state(folder / "one_step")
    assert same(alone["optimizers"]["AdamW"], both["optimizers"]["AdamW"])
    ours, theirs = (run["optimizers"]["ManifoldMuon"]["state"] for run in (alone, both))
    assert len(ours) == len(theirs) == 8
    assert all(same(s["momentum"], theirs[i]["momentum"]) for i, s in ours.items())  # after one step, of the gradient
    names = [name for group in alone["optimizers"]["AdamW"]["param_groups"] for name in group["names"]]
    assert len(names) > 5 and all(torch.equal(alone["model"][name], both["model"][name]) for name in names)
    for key, W in both["model"].items():
        assert torch.allclose(alone["model"][key], W, atol=1e-6), key


@pytest.mark.timeout(450)
def test_damage_to_any_file_is_named_and_an_older_checkpoint_is_used(folder, tmp_path):
    for name in ("tensors/__1_0.distcp", "tensors/.metadata", "state.pt", "manifest.json"):
        copy = shutil.copytree(folder / "fsdp/checkpoints", tmp_path / name.replace("/", "_"))
        file = copy / "step_00000004" / name
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
        with pytest.raises(CheckpointError, match=name):
            load(file.parents[name.count("/")])
        loaded = load_newest(copy)
        assert loaded.step == 2 and name in loaded.skipped[0][1]
        file.unlink()
        with pytest.raises(CheckpointError, match="is not a checkpoint"):
            load(file.parents[name.count("/")])


def test_a_forged_table_is_not_executed(tmp_path):
    class Forged:
        def __reduce__(self):
            return print, ("executed",)

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Forged()))
    with pytest.raises(pickle.UnpicklingError, match=r"builtins\.print"):
        read_shards(tmp_path)


@pytest.mark.parametrize(
    ("module", "name"),
    [("torch", "load"), ("torch.distributed.checkpoint.filesystem", "Path"), ("torch.distributed.checkpoint", "save")],
)
def test_a_table_holds_nothing_but_its_own_classes_and_dtypes(tmp_path, module, name):
    (tmp_path / ".metadata").write_bytes(f"c{module}\n{name}\n.".encode())
    with pytest.raises(pickle.UnpicklingError, match=f"{module}.{name} does not belong"):
        read_shards(tmp_path)


def test_tensors_of_any_dtype_are_read_as_they_were_written(tmp_path):
    ranks = Ranks(0, 1, torch.device("cpu"), 60.0)
    tensors = {"a": torch.ones(3, dtype=torch.bfloat16), "b": torch.tensor([2**40 + 1]), "c": torch.tensor(1.5)}
    assert {"tensors/__0_0.distcp", "tensors/.metadata"} == set(write_shards(tmp_path / "tensors", tensors, ranks))
    assert same(read_shards(tmp_path / "tensors"), tensors)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Not a directory"):
        write_shards(tmp_path / "file" / "tensors", tensors, ranks)


def test_the_names_of_the_tensors_files_are_on_the_disk_too(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    state = {"model": {"w": torch.ones(3)}, "optimizers": {}}
    save_sharded(tmp_path, 3, state, Ranks(0, 1, torch.device("cpu"), 60.0), metric=2.0)
    assert f"{tmp_path}/.step_00000003.tmp/tensors" in synced
    loaded = load(tmp_path / "step_00000003")
    assert same(loaded.state, state) and loaded.metric == 2.0


def test_a_check_compares_what_is_on_every_rank():
    compared = []
    ranks = SimpleNamespace(require_equal=compared.append)
    Replicated.check(SimpleNamespace(ranks=ranks, params={"a": 1}))
    for scalars in ({"b": 2}, {}):
        Sharded.check(SimpleNamespace(ranks=ranks, scalars=scalars))
    assert compared == [{"a": 1}, {"b": 2}]


def look_inside(cfg, folder):
    """Write what a rank holds before and after a backward pass, and whether its whole parameters are those it started with."""
    ranks = Ranks.init(cfg)
    torch.manual_seed(0)
    model, optimizers = build(cfg)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    placement = place(model, optimizers, ranks, cfg)

    def held():
        tensors = [t for p in model.parameters() for t in (p, p.grad) if t is not None]
        local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local}.values())

    def split(words):
        return [isinstance(p, DTensor) for name, p in model.named_parameters() if words in name]

    sizes, every, in_blocks = [held()], split(""), split(".h.")
    x = torch.arange(17).expand(2, 17)
    loss = placement.replica(x[:, :-1], x[:, 1:])[1]
    parted = [split(".h.") == in_blocks]
    loss.backward()
    sizes.append(held())
    norms = [clip(placement.gradients(), 0.01, placement.whole_norms)[0].item() for _ in range(2)]
    with placement.whole() as params:
        whole = all(torch.equal(params[name], W) for name, W in start.items())
    sizes.append(held())
    parted.append(split("") == every)
    with torch.no_grad():
        placement.replica(x[:, :-1], x[:, 1:])
    parted.append(split(".h.") == in_blocks and any(in_blocks))
    numbers = sum(p.numel() for p in start.values())
    found = {"sizes": sizes, "whole": whole, "numbers": numbers, "norms": norms, "parted": parted}
    (folder / f"{ranks.rank}.json").write_text(json.dumps(found))
    ranks.close()


@pytest.mark.timeout(200)
def test_a_rank_holds_its_part_and_no_more(tiny_data, tmp_path):
    cfg = compose([*tiny_data, *RUN])
    assert finish(start_ranks(2, look_inside, cfg, tmp_path, output=str(tmp_path / "output.txt")), timeout=100) == [
        0,
        0,
    ]
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert all(f["whole"] for f in found)
    assert (
        found[0]["parted"] == found[1]["parted"] == [True] * 3
    )  # after a forward pass, the use of whole weights, another
    before, after = found[0]["norms"]
    assert found[1]["norms"] == [before, after] and before > 0.02 and after == pytest.approx(0.01, rel=1e-3)
    small = 64 * 4  # a NaN for each borrowed matrix
    for i, copies in enumerate((1, 2, 2)):  # weights; then gradients too
        total = sum(f["sizes"][i] for f in found)
        assert total == pytest.approx(4 * copies * found[0]["numbers"], abs=small)
        assert max(f["sizes"][i] for f in found) < 0.6 * total


def train_compiled(cfgs, ports):
    """As on CUDA, where `compile=auto` means on, but for the last stage of the compiler, which would take minutes."""
    from torch._dynamo.utils import counters

    torch.compile = partial(torch.compile, backend="aot_eager")
    train_all(cfgs, ports)
    assert counters["stats"]["unique_graphs"] > 0


@pytest.mark.campaign
@pytest.mark.timeout(450)
def test_compiled_blocks_train_as_others_do(tiny_data, tmp_path):
    runs = {"plain": "compile=false", "compiled": "compile=true"}
    cfgs = [compose([*tiny_data, *RUN, word, f"output_dir={tmp_path}/{name}"]) for name, word in runs.items()]
    output = tmp_path / "output.txt"
    codes = finish(start_ranks(2, train_compiled, cfgs, [free_port() for _ in cfgs], output=str(output)), timeout=400)
    assert codes == [0, 0], output.read_text()
    plain, ours = ([r["loss"] for r in records(tmp_path / name) if r["kind"] == "train"] for name in runs)
    assert len(plain) == 4 and ours == pytest.approx(plain, rel=1e-5)


def test_what_cannot_be_sharded_is_refused(tiny_data):
    check(compose(["launcher.nproc=8", "launcher.shard=fsdp", "model=gpt2_1_5b", "experiment=one_gpu"]))
    for asked in (
        ["model=ngpt_demo"],
        ["attention=qk_clip", "attention.qk_clip_on=weights", "assignment=unconstrained"],
    ):
        with pytest.raises(ConfigError, match=r"launcher\.shard=fsdp does not work with"):
            check(compose([*tiny_data, "launcher.shard=fsdp", *asked]))
