"""The public optimizer track: its order of the data, its rule, and a tiny copy of its task with the logs for it."""

import shutil

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

    directory = "counted"

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


def test_a_split_shorter_than_a_window_is_refused():
    with pytest.raises(DataError, match="3 tokens"):
        first_windows(Counted(3), 4, 1)


def test_the_rule_is_the_published_one():
    """Its own examples: 3.276 suffices for one run, a mean of 3.278 for four; 3.09 standard deviations are p = .001."""
    assert significance([3.276])[0] and not significance([3.2761])[0]
    assert significance([3.278] * 4)[0] and not significance([3.2781] * 4)[0]
    assert significance([3.28 - 3.0902 * 0.0013])[1] == pytest.approx(0.001, rel=1e-3)
    curves = [{100: 3.29, 125: 3.279, 150: 3.277}, {100: 3.29, 125: 3.27, 150: 3.277, 175: 3.2}]
    assert stopping_step(curves) == 125 and stopping_step([{1: 4.0}]) is None
    assert stopping_step([{8: 3.2, 1: 3.2}]) == 1  # the first, in whatever order they come


def test_runs_are_judged_where_all_were_evaluated():
    """A run that became unstable was last evaluated at a step that no other run has."""
    stopped, step, losses, _ = judged([{0: 9.0, 100: 3.4, 125: 3.3}, {0: 9.0, 100: 3.5, 107: 8.0}])
    assert (stopped, step, losses) == (None, 100, [3.4, 3.5])
    stopped, step, losses, p = judged([{100: 3.29, 125: 3.2}, {100: 3.29, 125: 3.2}])
    assert (stopped, step, losses) == (125, 125, [3.2, 3.2]) and p < 1e-9
    assert judged([{100: 3.29, 125: 3.2, 150: 3.3}] * 2)[:3] == (
        125,
        125,
        [3.2, 3.2],
    )  # where it stopped, not at the end


def test_the_architecture_has_the_baselines_size():
    """Matrices, tables, biases (9·768 a layer and the head's) and gains, as counted in its code."""
    from model.gpt import GPT
    from training.build import gpt_config

    with torch.device("meta"):
        model = GPT(gpt_config(compose(["experiment=speedrun_track3", "data=stdlib"])))
    assert model.parameter_count() == 12 * 12 * 768**2 + 2 * 50304 * 768 + 50304 + 12 * 9 * 768 + 26 * 768


def baseline_loss(w, x, y, heads):
    """The loss of the baseline (records/track_3_optimization/train_gpt_simple.py of modded-nanogpt), written anew, for weights w by our names."""

    def norm(u, gain=1.0):
        return u / u.square().mean(-1, keepdim=True).sqrt() * gain

    def linear(u, name):
        return u @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    h = norm(w["transformer.wte.weight"][x], w["transformer.entry.weight"])
    (B, T, d), quarter = h.shape, h.size(-1) // heads // 4
    rates = torch.cat([1024.0 ** -torch.linspace(0, 1, quarter, dtype=h.dtype), torch.zeros(quarter, dtype=h.dtype)])
    turn = torch.polar(torch.ones(T, 2 * quarter, dtype=h.dtype), -torch.outer(torch.arange(T, dtype=h.dtype), rates))
    future = torch.ones(T, T).triu(1).bool()
    for block in ("transformer.h.0", "transformer.h.1"):
        z = linear(norm(h, w[f"{block}.ln_1.weight"]), f"{block}.attn.c_attn")
        q, k, v = z.view(B, T, 3, heads, 4 * quarter).permute(2, 0, 3, 1, 4)
        q, k = (torch.complex(*norm(u).chunk(2, -1)) * turn for u in (q, k))  # the second half of a head is imaginary
        p = torch.softmax((0.12 * (q @ k.mH).real).masked_fill(future, -torch.inf), -1)
        h = h + linear((p @ v).transpose(1, 2).reshape(B, T, d), f"{block}.attn.c_proj")
        hidden = linear(norm(h, w[f"{block}.ln_2.weight"]), f"{block}.mlp.c_fc").relu().square()
        h = h + linear(hidden, f"{block}.mlp.c_proj")
    z = linear(norm(h, w["transformer.ln_f.weight"]), "lm_head")
    z = 15 * z / (z.square() + 15**2).sqrt()
    return (z.logsumexp(-1) - z.gather(-1, y[..., None]).squeeze(-1)).mean()


def halves_exchanged(w, heads):
    """The weights with the two halves of each head's queries and keys in each other's place, in (3d, d) and (3d,) of c_attn."""

    def exchanged(p):
        queries_and_keys, values = p.view(3, heads, 2, -1, *p.shape[1:]).split([2, 1])
        return torch.cat([queries_and_keys.flip(2), values]).reshape(p.shape)

    return {name: exchanged(p) if ".c_attn." in name else p for name, p in w.items()}


def test_the_architecture_computes_what_the_baselines_does():
    """In float64 but for our rotation, QK-norm and loss, which are in float32. The baseline's rotation turns the other way."""
    from model.gpt import GPT
    from training.build import gpt_config

    size = ["model.n_layer=2", "model.n_embd=32", "model.n_head=2", "model.block_size=16", "model.vocab_size=64"]
    model = GPT(gpt_config(compose(["model=speedrun", *size]))).double()
    generator = torch.Generator().manual_seed(0)
    w = dict(model.named_parameters())
    for p in w.values():
        p.data = 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype) + (p.data if p.ndim == 1 else 0)
    x, y = torch.randint(64, (2, 3, 16), generator=generator)
    ours, theirs = model(x, y)[1], baseline_loss(halves_exchanged(w, 2), x, y, 2)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    for name, a, b in zip(w, *(torch.autograd.grad(loss, list(w.values())) for loss in (ours, theirs))):
        assert torch.linalg.norm(a - b) < 2e-6 * torch.linalg.norm(b), name
    assert abs(ours.item() - baseline_loss(w, x, y, 2).item()) > 1e-3  # without the exchange


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
    said = capsys.readouterr().out
    assert "not reached: mean" in said and "(σ=0.0013) at that step, not adjusted for the evaluations before it" in said
    log = (tmp_path / "logs" / f"{tmp_path.name}_seed_1.txt").read_text()
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
    shutil.rmtree(tmp_path / "logs")
    for logs in (tmp_path / "seed_1/config.yaml", "/proc/x"):
        assert speedrun_log.main([*arguments[:2], f"logs={logs}"]) == 2
        out, err = capsys.readouterr()
        assert "logs=" in err and str(logs) in err and not out
    for name in ("environment.json", "parameters.txt"):
        (tmp_path / "seed_2" / name).unlink()
    assert speedrun_log.main(arguments) == 2 and not (tmp_path / "logs").exists()
    said = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in said] == [
        f"{tmp_path}/seed_2 has no {name}" for name in ("environment.json", "parameters.txt")
    ]
