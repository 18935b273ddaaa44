"""Steps of the certified rule at every level: one round of the retraction, two, or exactly."""

import pytest
import torch
from problems import make
from test_certified import one_step, stack_of

from optim.certified import CertifiedStep
from optim.manifolds import MANIFOLDS
from optim.stack import EXACTLY, ONE_ROUND, TWO_ROUNDS


@pytest.mark.parametrize("level", [TWO_ROUNDS, EXACTLY])
@pytest.mark.parametrize("settings", [{"decay": 5.0}, {"norm_cap": 0.5}])
def test_decay_and_a_cap_act_once_at_every_level(level, settings):
    W, G = make("dgram")
    plain, found = (one_step(W, G, "dgram", 0.02, at, **settings).W.norm(dim=-2) for at in (ONE_ROUND, level))
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=0)
    free = one_step(W, G, "dgram", 0.02).W.norm(dim=-2)
    torch.testing.assert_close(plain, 0.9 * free if "decay" in settings else free.clamp_max(0.5), rtol=1e-3, atol=0)


@pytest.mark.parametrize("eta", [0.08, 0.17])
def test_a_second_round_is_asked_for_before_one_does_not_land(eta):
    g = torch.Generator().manual_seed(0)
    W, levels = MANIFOLDS["stiefel"].retract(torch.randn(1, 96, 32, generator=g)), [ONE_ROUND]
    for step in range(4):
        moved = CertifiedStep()(stack_of(W, torch.randn(1, 96, 32, generator=g), "stiefel", eta, 0.0, levels))
        assert step == 0 or not torch.equal(moved.W, W)
        W, levels = moved.W, [int(moved.level)]
        assert step == 0 or MANIFOLDS["stiefel"].distance(W) < 1e-6
