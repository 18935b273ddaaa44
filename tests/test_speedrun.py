"""The public optimizer track: its order of the data, its rule, and a tiny copy of its task with the logs for it."""

import numpy as np
import pytest
import torch
from conftest import ROOT

from data.in_order import InOrder, first_windows
from data.shards import DataError
from scripts import speedrun_log
from scripts.analysis.statistics import judged, significance, stopping_step
from train import train
from training.config import compose


class Counted:
    """A split whose tokens are their positions, in shards of these lengths."""

    def __init__(self, *lengths):
        self.shards = [type("Shard", (), {"tokens": n})() for n in lengths]
        self.tokens, self.parts, self.weights = sum(lengths), (self,), (1.0,)

    def read(self, start, length):
        return np.arange(start, start + length).astype(np.uint16)


def test_batches_follow_each_other_and_leave_out_the_rest_of_a_shard():
    """Shards of 20 and 10 tokens, batches of two windows of four: two batches of the first shard, one of the second."""
    whole = InOrder(Counted(20, 10), 4, 0, 2)
    starts = [whole.batch(step)[:, 0].tolist() for step in range(4)]
    assert starts == [[0, 4], [8, 12], [20, 24], [0, 4]]
    assert whole.batch(0).tolist() == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]
    ranks = [InOrder(Counted(20, 10), 4, 0, 2, rank, 2).batch(1) for rank in (0, 1)]
    assert np.array_equal(np.concatenate(ranks), whole.batch(1))
    with pytest.raises(DataError, match="use a smaller global_batch_tokens"):
        InOrder(Counted(9, 9), 4, 0, 2)


def test_evaluation_is_on_the_first_tokens():
    assert first_windows(Counted(20), 4, 3)[:, 0].tolist() == [0, 4, 8]
    assert first_windows(Counted(20), 4, 99)[:, -1].tolist() == [4, 8, 12, 16]


def test_the_rule_is_the_published_one():
    """Its own examples: 3.276 suffices for one run, a mean of 3.278 for four; 3.09 standard deviations are p = .001."""
    assert significance([3.276])[0] and not significance([3.2761])[0]
    assert significance([3.278] * 4)[0] and not significance([3.2781] * 4)[0]
    assert significance([3.28 - 3.0902 * 0.0013])[1] == pytest.approx(0.001, rel=1e-3)
    curves = [{100: 3.29, 125: 3.279, 150: 3.277}, {100: 3.29, 125: 3.27, 150: 3.277, 175: 3.2}]
    assert stopping_step(curves) == 125 and stopping_step([{1: 4.0}]) is None


def test_runs_are_judged_where_all_were_evaluated():
    """A run that became unstable was last evaluated at a step that no other run has."""
    stopped, step, losses, _ = judged([{0: 9.0, 100: 3.4, 125: 3.3}, {0: 9.0, 100: 3.5, 107: 8.0}])
    assert (stopped, step, losses) == (None, 100, [3.4, 3.5])
    stopped, step, losses, p = judged([{100: 3.29, 125: 3.2}, {100: 3.29, 125: 3.2}])
    assert (stopped, step, losses) == (125, 125, [3.2, 3.2]) and p < 1e-9


def test_the_architecture_has_the_baselines_size():
    """Matrices, tables, biases (9·768 a layer and the head's) and gains, as counted in its code."""
    from model.gpt import GPT
    from training.build import gpt_config

    with torch.device("meta"):
        model = GPT(gpt_config(compose(["experiment=speedrun_track3", "data=stdlib"])))
    assert model.parameter_count() == 12 * 12 * 768**2 + 2 * 50304 * 768 + 50304 + 12 * 9 * 768 + 26 * 768


def test_a_tiny_copy_and_its_logs(tiny, tmp_path, capsys):
    """Two seeds; the log holds code, settings and losses, and the verdict is that of the rule."""
    small = [o for o in tiny if not o.startswith(("output_dir=", "max_steps="))] + ["model.vocab_size=320"]
    for seed in (1, 2):
        train(
            compose(
                [
                    "experiment=speedrun_track3",
                    *small,
                    "max_steps=6",
                    f"seed={seed}",
                    f"output_dir={tmp_path}/seed_{seed}",
                ]
            )
        )
    arguments = [f"{tmp_path}/seed_1", f"{tmp_path}/seed_2", f"logs={tmp_path}/logs"]
    assert speedrun_log.main(arguments) == 0
    assert "not reached: mean" in capsys.readouterr().out
    log = (tmp_path / "logs" / "seed_1.txt").read_text()
    assert (ROOT / "optim" / "manifold_muon.py").read_text().rstrip() in log and "global_batch_tokens: 128" in log
    assert "step:5/6 val_loss:" in log and log.count("step_avg:") == 3
    assert speedrun_log.main([*arguments, "target=9"]) == 0
    assert "9 is reached at step 0: mean" in capsys.readouterr().out
    train(compose(["experiment=speedrun_track3", *small, "max_steps=2", f"output_dir={tmp_path}/other"]))
    assert speedrun_log.main([*arguments, f"{tmp_path}/other"]) == 2
    assert "the runs differ in max_steps" in capsys.readouterr().err
    (tmp_path / "young").mkdir()
    (tmp_path / "young" / "config.yaml").write_text((tmp_path / "seed_1" / "config.yaml").read_text())
    (tmp_path / "young" / "metrics.jsonl").write_text(
        '{"kind": "train", "step": 1, "loss": 5.0, "tokens_per_s": 1.0}\n'
    )
    assert speedrun_log.main([*arguments, f"{tmp_path}/young"]) == 2
    assert "young has no evaluation yet" in capsys.readouterr().err
