"""Turns of the stream: the angle against planted ones, every rule against its formula, and pre-norm as a rule on the sphere."""

import math
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from test_residual import RULES, SPHERE, rule_of

from model.gpt import GPT, GPTConfig
from model.probes import probe
from model.residual import PreNormJoint, Stream
from model.turns import angle_between, tangent_length
from optim.geonorm import DECAYS, retraction_angle, rotate
from scripts.analysis.stream_figures import has_scheduled_steps

LAYERS, WIDTH = 3, 16
SHAPE = {"block_size": 8, "vocab_size": 32, "n_layer": LAYERS, "n_head": 2, "n_embd": WIDTH}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def gpt(rule, **settings):
    return GPT(GPTConfig(**{**SHAPE, **settings}, residual=rule_of(rule)))


def turns_of(model):
    return probe(model, torch.randint(32, (2, 8)))["stream"]


@pytest.mark.parametrize("angle", [0.0, 1e-12, 1e-6, 1.0, math.pi / 2, math.pi - 1e-9, math.pi])
def test_a_planted_angle_is_found_to_rounding(angle):
    x, g = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    y = 3 * rotate(x, g, lambda t: torch.full_like(t, angle))
    assert torch.allclose(angle_between(x, y), torch.tensor(angle, dtype=torch.float64), rtol=1e-6, atol=1e-15)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_says_how_far_its_sublayers_turn(rule):
    seen = turns_of(gpt(rule, residual_scale=4.0))
    turned = [*seen["turn_attn"], *seen["turn_mlp"]]
    assert len(turned) == 2 * LAYERS and all(0 <= angle <= math.pi for angle in turned)
    assert seen["path"] == pytest.approx(sum(turned), rel=1e-5) and seen["net"] <= seen["path"] * (1 + 1e-6)
    assert len(seen["size"]) == 2 * LAYERS + 1
    if rule in SPHERE:
        assert seen["size"] == pytest.approx([1.0] * (2 * LAYERS + 1), rel=1e-5)
    if rule == "pre_rms_norm":  # c_proj is 0 at the start
        assert seen["path"] == 0 and all(map(math.isnan, seen["step_attn"]))
    else:
        assert min(turned) > 0 and min(*seen["step_attn"], *seen["step_mlp"]) > 0


@pytest.mark.parametrize("sublayer", ["attn", "mlp"])
def test_the_step_of_geonorm_is_its_scale_over_d(sublayer):
    model = gpt("geonorm")
    with torch.no_grad():
        for block in model.transformer.h:
            block.ln_1.angle.scale.fill_(0.5)
            block.ln_2.angle.scale.fill_(0.5)
    expected = [0.5 * DECAYS["harmonic"](layer, LAYERS) for layer in range(LAYERS)]
    assert turns_of(model)[f"step_{sublayer}"] == pytest.approx(expected, rel=1e-4)


def test_the_ends_of_the_path_and_the_sizes_of_a_stream_that_grows():
    model, x = gpt("pre_norm", residual_scale=20.0), torch.randint(32, (2, 8))
    with torch.no_grad():
        passed = [model.embed(x)]
        for block in model.transformer.h:
            for joint, sublayer in block.joined():
                passed.append(joint(passed[-1], sublayer))
    seen = probe(model, x)["stream"]
    sizes = [h.norm(dim=-1).mean().item() / math.sqrt(WIDTH) for h in passed]
    assert seen["size"] == pytest.approx(sizes, rel=1e-5) and sizes[-1] > 2 * sizes[0]
    assert seen["net"] == pytest.approx(angle_between(passed[0], passed[-1]).mean().item(), rel=1e-4)


def test_the_step_of_a_retraction_falls_where_it_saturates():
    for scale, step in ((0.1, 1.0), (1e6, 0.0)):  # φ = arctan t: t for a small output, at most π/2
        seen = turns_of(gpt("proj_sphere", residual_scale=scale))
        assert seen["step_mlp"] == pytest.approx([step] * LAYERS, abs=1e-3)


def test_the_step_of_geonorm_without_a_normalized_embedding_is_longer_by_what_its_tokens_are_shorter():
    model, short = gpt("geonorm_with_norms"), 0.02
    with torch.no_grad():
        model.transformer.wpe.weight.zero_()
        model.transformer.wte.weight.copy_(short * F.normalize(model.transformer.wte.weight, dim=-1) * math.sqrt(WIDTH))
        for block in model.transformer.h:  # so small that no angle is clamped
            block.attn.c_proj.weight.mul_(1e-3)
            block.mlp.c_proj.weight.mul_(1e-3)
    expected = [DECAYS["harmonic"](layer, LAYERS) / short for layer in range(LAYERS)]
    seen = turns_of(model)
    assert seen["step_attn"] == pytest.approx(expected, rel=1e-3) and seen["step_mlp"] == pytest.approx(
        expected, rel=1e-3
    )


def test_only_steps_that_are_scheduled_are_drawn_beside_the_schedule():
    rules = (*RULES, "geonorm_with_norms")
    shown = {name: has_scheduled_steps({"residual": asdict(rule_of(name))}) for name in rules}
    assert {rule for rule, scheduled in shown.items() if scheduled} == {"geonorm"}


@pytest.mark.parametrize(("rule", "decay"), [("proj_sphere", "none"), ("geonorm", "harmonic")])
def test_first_turns_on_the_sphere_are_those_of_pre_norm_once_c_proj_grows_as_the_embedding_did(rule, decay):
    """GPT-2's embedding, 0.02·√2 with positions, is scaled to 1 on the sphere; c_proj is not, unless `init.residual_scale` does it.

    GeoNorm turns D(l) times less than the projection in both cases."""
    found = {}
    for name, scale in (("pre_norm", 1.0), (rule, 1.0), (rule, 1 / (0.02 * math.sqrt(2)))):
        torch.manual_seed(0)
        seen = turns_of(gpt(name, residual_scale=scale))
        found[name, scale > 1] = torch.tensor([seen["turn_attn"], seen["turn_mlp"]])  # (2, L)
    decays = torch.tensor([DECAYS[decay](layer, LAYERS) for layer in range(LAYERS)])
    assert (found[rule, False] < 0.05 * decays * found["pre_norm", False]).all()
    assert torch.allclose(found[rule, True], decays * found["pre_norm", False], rtol=0.3)
    assert (found[rule, True] / decays).sum().item() == pytest.approx(found["pre_norm", False].sum().item(), rel=0.15)


def test_the_turn_of_ngpt_is_that_of_its_interpolation():
    """tan φ = α sin θ / (1 - α + α cos θ), where θ is the angle between the stream and the output."""
    model, found = gpt("ngpt"), {}
    block, x = model.transformer.h[0], torch.randint(32, (2, 8))
    with torch.no_grad():
        h, seen = model.embed(x), probe(model, x)["stream"]
        theta, a = angle_between(h, block.attn(h)), 0.05
    found = torch.atan2(a * theta.sin(), 1 - a + a * theta.cos()).mean().item()
    assert seen["turn_attn"][0] == pytest.approx(found, rel=1e-4)


# ---- pre-norm as a rule on the sphere ----


def test_pre_norm_is_the_projection_with_a_step_that_shrinks_as_the_stream_grows():
    """Direction and length: u' = rotate(u, g, arctan(α t)) with α = 1/(R + ⟨u,g⟩), and R' = √((R + ⟨u,g⟩)² + t²), t = |g - ⟨u,g⟩u|.

    The second chain knows u and R only; its sublayers see u. Nothing is approximated, so the last features are the same to rounding.
    """
    model = gpt("pre_norm", n_layer=6, residual_scale=20.0).double()
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 0.0  # so that a norm sees the direction alone
    with torch.no_grad():
        x = model.embed(torch.randint(32, (2, 8)))
        R = x.norm(dim=-1, keepdim=True)
        u, steps = x / R, []
        for block in model.transformer.h:
            for joint, sublayer in ((block.ln_1, block.attn), (block.ln_2, block.mlp)):
                before, x = x, joint(x, sublayer)
                g = sublayer(F.layer_norm(u, (WIDTH,), joint.weight, eps=0.0))
                along, t = (u * g).sum(-1, keepdim=True), tangent_length(u, g)[..., None]
                alpha = 1 / (R + along)
                assert (alpha > 0).all()  # the output does not turn the stream by a right angle or more
                u = rotate(u, g, lambda s, alpha=alpha: retraction_angle(alpha * s, 1.0))
                R = torch.hypot(R + along, t)
                assert torch.allclose(angle_between(before, x), torch.atan(alpha * t).squeeze(-1), rtol=1e-10)
                assert torch.allclose(u * R, x, rtol=1e-11, atol=1e-13)
                steps.append(alpha.mean().item())
        assert torch.allclose(model.transformer.ln_f(u), model.transformer.ln_f(x), rtol=1e-10, atol=1e-12)
    assert steps[-1] < 0.5 * steps[0]


def test_the_implicit_decay_is_that_of_geonorms_schedules_in_two_limits():
    """Outputs as long as the embedding, 1: across the stream they give the step 1/√(l+1), along it 1/(l+2), l counting sublayers from 0."""
    basis = torch.eye(8, dtype=torch.float64)
    joint = PreNormJoint(Stream(8, 4, False, math.sqrt(8), True)).double()
    across, along = basis[0], basis[0]
    for sublayer in range(7):
        for x, share, decay in (
            (across, 1.0, DECAYS["sqrt"](sublayer, 8)),
            (along, 1e-4, DECAYS["harmonic"](sublayer + 1, 8)),
        ):
            g = math.sqrt(1 - share**2) * x / x.norm() + share * basis[sublayer + 1]  # of length 1
            with torch.no_grad():
                y = joint(x, lambda _, g=g: g)
            alpha = angle_between(x, y).tan() / tangent_length(x, g)
            assert alpha.item() == pytest.approx(decay, rel=1e-6)
            across, along = (y, along) if share == 1 else (across, y)
