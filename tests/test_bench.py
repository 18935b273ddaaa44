"""The benchmarks: each measures what it says and writes what it prints."""

import json

import numpy as np
import pytest
import torch

from scripts import bench, bench_residual


def test_bench_measures_every_rule():
    sizes = {"layers": 1, "width": 16, "heads": 2, "block": 8, "vocab": 32, "micro": 1, "tokens": 16}
    options = {"layers": 0, "width": 0, "micro_batch_size": 0, "repeats": 1}
    rows = {row["rule"]: row for row in bench_residual.residual_rows(options, sizes)}
    assert set(rows) == set(bench_residual.residual_settings())
    assert rows["pre_norm"]["time ratio"] == rows["pre_norm"]["memory ratio"] == 1.0
    assert rows["sandwich_norm"]["memory ratio"] > 1.0 and all(row["fastest s"] > 0 for row in rows.values())


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("residual", ["layers=1", "micro_batch_size=1", "repeats=1"], ["geonorm", "nGPT", "time ratio"]),
        ("probes", ["model=demo", "tokens=256", "micro_batch_size=1", "repeats=1"], ["share of training"]),
        ("train", ["model=demo", "tokens=256", "assignments=hetero", "repeats=1"], ["hetero", "optimizer share"]),
        ("ceilings", ["repeats=1"], ["copy, bytes read and written", "svdvals", "cuDNN, forward"]),
        (
            "profile",
            ["model=demo", "tokens=256", "micro_batch_size=1", "assignments=adamw"],
            ["aten::mm", "calls a step"],
        ),
        ("scaling", [], ["gpt2_774m", "1024", "received MiB a rank", "exchange ms, predicted"]),
        ("memory", [], ["gpt2_1_5b", "fsdp", "not measured"]),
    ],
)
def test_bench_writes_what_it_prints(name, options, told, tmp_path, monkeypatch, capsys):
    small = {"width": 16, "heads": 2, "block": 8, "vocab": 32, "tokens": 16}
    monkeypatch.setitem(bench_residual.RESIDUAL_SIZES, "cpu", bench_residual.RESIDUAL_SIZES["cpu"] | small)
    assert bench.main([name, *options, f"results={tmp_path}"]) == 0
    table, data = (tmp_path / f"bench_{name}.md").read_text(), json.loads((tmp_path / f"bench_{name}.json").read_text())
    printed = capsys.readouterr().out
    assert all(word in table and word in printed for word in told)
    assert data["rows"] and data["command"].startswith(f"python scripts/bench.py {name}") and data["device"] in table


def test_bench_names_its_benchmarks(capsys):
    assert bench.main([]) == bench.main(["speed"]) == 2
    assert (
        "name one benchmark: ceilings, optimizer, lmo, train, profile, residual, probes, scaling, memory"
        in capsys.readouterr().err
    )


def test_bench_lmo_measures_the_step_and_every_method(tmp_path, capsys):
    torch.manual_seed(0)
    W = torch.linalg.qr(torch.randn(12, 6))[0]
    np.savez(
        tmp_path / "p.npz", **{"stiefel_x/W": W.numpy(), "stiefel_x/G": torch.randn(12, 6), "stiefel_x/optimum": 1}
    )
    assert bench.main(["lmo", f"problems={tmp_path}/p.npz", f"results={tmp_path}"]) == 0
    rows = json.loads((tmp_path / "bench_lmo.json").read_text())["rows"]
    assert {"step, default, float32", "step, high, float16", "su", "dual_ascent"} <= {row["solver"] for row in rows}
    assert all(0.5 < row["certified feas"] < 1.01 for row in rows if row["solver"].startswith("step"))
    assert bench.main(["lmo", "problems=none.npz"]) == 2 and "no problems in none.npz" in capsys.readouterr().err
