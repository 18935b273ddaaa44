"""The numbers of the benchmarks' tables follow from what was timed or counted: ratios, rates and shares, with times that are given."""

import pytest
import torch

from model.gpt import GPT
from scripts import bench, bench_ceilings, bench_predicted, bench_residual, bench_scaling, bench_train
from scripts.bench_train import RandomTraining
from training.build import build, gpt_config
from training.config import compose


def test_ratios_of_optimizers_are_those_of_their_medians(monkeypatch):
    monkeypatch.setattr(
        bench, "take_turns", lambda steps, *_, **__: {n: [4.0 if "published" in n else 2.0] for n in steps}
    )
    rows = {row["step"]: row for row in bench.optimizer_rows({"layers": 1, "width": 16, "repeats": 1, "limit_s": 0})}
    assert (
        rows["ours"]["times faster than published"] == 2
        and rows["ours"]["GFLOP/s"] == rows["ours"]["counted GFLOP"] / 2
    )
    assert rows["published (bfloat16)"]["times faster than published"] == 1


def test_rates_are_those_of_the_timed_steps(monkeypatch):
    monkeypatch.setattr(bench_train, "take_turns", lambda steps, *_, **__: {key: [0.5] for key in steps})
    monkeypatch.setattr(bench_train, "steps_together", lambda: 1)
    monkeypatch.setattr(bench_train, "peak_flops", lambda device: 1e9)
    monkeypatch.setattr(RandomTraining, "update_seconds", lambda training: [9.0, 9.0, 0.1])  # two of the warm-up
    words = {"model": "demo", "assignments": "adamw", "optims": "manifold_muon", "variants": ""}
    [row] = bench_train.training_rows({**words, "tokens": 256, "micro_batch_size": 1, "repeats": 1, "limit_s": 0})
    with torch.device("meta"):
        operations = GPT(gpt_config(compose(["model=demo"]))).flops_per_token()
    assert row["tokens/s"] == 2 * row["tokens a step"] and row["MFU"] == pytest.approx(
        row["tokens/s"] * operations / 1e9
    )
    assert (row["optimizer s"], row["optimizer share"]) == (0.1, 0.2)


def test_a_probe_is_shared_by_the_steps_between_two(monkeypatch):
    seconds = {"step": [2.0], "probe": [3e5], "begun": [1e5], "rest": [4e5]}
    monkeypatch.setattr(bench_train, "take_turns", lambda *_: seconds)
    [row] = bench_train.probe_rows({"model": "demo", "tokens": 256, "micro_batch_size": 1, "repeats": 1})
    cfg = compose(["experiment=paper"])
    step = 2 * cfg.global_batch_tokens / row["measured tokens"]
    assert row["step s"] == step and row["spectra s"] == 5e5
    assert row["share of training"] == f"{100 * 3e5 / (cfg.probe.interval * step):.3f}%"
    assert row["their share"] == f"{100 * row['waited for s'] / (cfg.log.interval_spectra * step):.3f}%"


def test_ratios_of_a_rule_are_to_its_partner(monkeypatch):
    sizes = {"layers": 1, "width": 16, "heads": 2, "block": 8, "vocab": 32, "micro": 1, "tokens": 16}
    options = {"layers": 0, "width": 0, "micro_batch_size": 0, "repeats": 1, "limit_s": 0}
    rules = {name: bench_residual.residual_settings()[name] for name in ("pre_norm", "geonorm")}
    monkeypatch.setattr(bench_residual, "residual_settings", lambda: rules)
    monkeypatch.setattr(bench_residual, "take_turns", lambda *_, **__: {"pre_norm": [2.0, 4.0], "geonorm": [3.0, 3.0]})
    kept = iter([100, 150])
    monkeypatch.setattr(bench_residual, "kept_bytes", lambda *_: next(kept))
    _, rule = bench_residual.residual_rows(options, sizes)
    assert [rule[f"{what} ratio"] for what in ("time", "median", "memory")] == [1.5, 1.0, 1.5]


def test_what_ranks_share_is_counted_by_owners():
    shapes = bench_scaling.Shapes.of(["model=demo"])
    owners = shapes.owners(5)
    work = [sum(flops) for flops in shapes.bucket_flops(owners, 5)]
    own = [4 * sum(p.numel() for p, rank in owners.items() if rank == r) for r in range(5)]
    found = bench_scaling.scaling_row("demo", shapes, 5)
    assert max(own) > min(own) and found["received MiB a rank"] == (sum(own) - min(own)) / 2**20
    assert found["heaviest / mean"] == pytest.approx(max(work) / (sum(work) / 5))


def test_counted_memory_is_what_one_rank_holds():
    words = ["model=demo", *bench_scaling.SMALL]
    model, optimizers = build(compose(["assignment=hetero", *words]))
    x = torch.zeros(1, 16, dtype=torch.int64)
    model(x, x)[1].backward()
    optimizers.step()
    counted = bench_scaling.counted_memory(bench_scaling.Shapes.of(words), 1, "ddp", product_bytes=4)
    held = counted["weights"] + counted["gradients"] + counted["state"]
    assert bench_scaling.held_bytes(model, optimizers) == pytest.approx(held, rel=1e-3)


def test_rates_of_ceilings():
    sizes = bench_ceilings.CEILING_SIZES["cpu"]
    copy, product, *_ = bench_ceilings.ceilings(sizes, torch.device("cpu"))
    assert copy.work == pytest.approx(2 * sizes["copy"] / 1e9)  # every byte is read and written
    assert product.work == pytest.approx(2 * sizes["product"] ** 3 / 1e12)
    [found] = [bench_ceilings.ceiling_row(bench_ceilings.Ceiling("x", lambda: lambda: None, 3.0, "u"), 1)]
    assert found["rate"] == 3.0 / found["median s"]


def test_predictions_are_the_step_of_adamw_and_what_is_added(monkeypatch):
    monkeypatch.setattr(bench_predicted, "step_seconds", lambda *group: (1e-4, 5e-5))
    table = {row["assignment"]: row for row in bench_predicted.predicted_rows()}
    assert table["adamw"]["tokens/s, predicted"] == pytest.approx(473e3)
    around = 12 * 12 * 768**2 * (40 - 28) / 3.8e12  # bytes a parameter, beyond AdamW's
    base = 65536 / 473e3
    assert table["hetero"]["tokens/s, predicted"] == pytest.approx(65536 / (base + around + 48e-4))
    assert table["hetero"]["at faster"] == pytest.approx(base / (base + around + 24e-4))


def test_the_fewest_calls_are_the_first_that_reach_the_bar():
    rows = [
        {"problem": "p", "solver": "su", "calls": calls, "⟨G,A⟩/optimum": value, "seconds": calls / 10}
        for calls, value in ((1, 0.9), (3, 0.97), (6, 0.992))
    ]
    [found] = bench.calls_needed(rows)
    assert [found[f"calls to {bar}"] for bar in (0.95, 0.99, 0.999)] == [3, 6, "–"] and found["s to 0.95"] == 0.3
