"""Sharded over two ranks, a run is the run of DDP: weights, records, checkpoints."""

import json

import pytest
import torch
from harness import final_state, finish, records, same, start_ranks

from train import train
from training.checkpoint import CheckpointError, load, load_newest
from training.config import compose
from training.log import read_records

# Every rank computes its windows at once, and the clip does not act: then all sums are the same as DDP's.
EXACT = ["global_batch_tokens=128", "micro_batch_size=4", "grad_clip=null", "max_steps=6", "log.interval_spectra=3"]


@pytest.fixture
def settings(tiny):
    """Overrides of a two-layer run without a directory."""
    replaced = {s.split("=")[0] for s in EXACT} | {"output_dir", "model.n_layer"}
    return [o for o in tiny if o.split("=")[0] not in replaced] + EXACT + ["model.n_layer=2", "checkpoint.interval=3"]


def train_all(*cfgs):
    for cfg in cfgs:
        train(cfg)


def on_two_ranks(folder, *runs):
    """Train configurations one after the other on the same two ranks."""
    output = folder / "output.txt"
    codes = finish(start_ranks(2, train_all, *(compose(run) for run in runs), output=str(output)), timeout=100)
    assert codes == [0, 0], output.read_text()


def without_norm(found):
    return [{k: v for k, v in record.items() if k != "grad_norm"} for record in found]


@pytest.mark.timeout(200)
def test_sharded_is_ddp_bit_by_bit(settings, tmp_path):
    variants = {
        "hetero": ["assignment=hetero"],
        "adamw": ["assignment=adamw", "residual=p_sphere"],
        "bfloat16": ["assignment=custom", "assignment.rules={attn: euclidean, c_fc: dgram, mlp.c_proj: adamw}", "dtype=bfloat16"],
    }
    runs = [
        [*settings, *extra, f"output_dir={tmp_path}/{name}_{shard}", f"launcher.shard={shard}"]
        for name, extra in variants.items()
        for shard in ("ddp", "fsdp")
    ]
    on_two_ranks(tmp_path, *runs)
    for name in variants:
        ddp, fsdp = (tmp_path / f"{name}_{shard}" for shard in ("ddp", "fsdp"))
        a, b = final_state(ddp), final_state(fsdp)
        for key in a["model"].keys() & b["model"].keys():
            assert torch.equal(a["model"][key], b["model"][key]), (name, key)
        assert same(a["optimizers"], b["optimizers"]), name
        assert same(without_norm(records(ddp)), without_norm(records(fsdp))), name
