"""Residual rules: each against its formula, first order, the stream's length, every assignment, tracing, and bad settings."""

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model.gpt import GPT, GPTConfig
from model.residual import RESIDUAL_RULES, Stream, residual_rule
from training.build import build_optimizers
from training.checks import check
from training.config import compose
from training.fields import Section
from training.settings import Settings
from training.validate import ConfigError

RULES = list(RESIDUAL_RULES)
SPHERE = ["geonorm", "proj_sphere", "cayley_sphere", "p_sphere", "ngpt"]
ASSIGNMENTS = ["adamw", "unconstrained", "all_stiefel", "all_dgram", "hetero", "hetero_inv"]
WIDTH, LAYERS, LAYER = 16, 4, 1
STREAM = Stream(WIDTH, LAYERS, bias=False, radius=math.sqrt(WIDTH), skips=True)
RESIDUAL = Section(Settings).kinds["residual"]
TINY = {"block_size": 8, "vocab_size": 32, "n_layer": 2, "n_head": 2, "n_embd": WIDTH}


@cache
def composed(*overrides):
    return compose(overrides)


def settings(name, **changed):
    return {**composed(f"residual={name}").plain()["residual"], **changed}


def rule_of(name, **changed):
    return residual_rule(settings(name, **changed))


def sublayer(seed=0, scale=1.0):
    torch.manual_seed(seed)
    W = scale * torch.randn(WIDTH, WIDTH) / math.sqrt(WIDTH)
    return lambda x: torch.tanh(x @ W)


def on_sphere(n=5, seed=1):
    torch.manual_seed(seed)
    return math.sqrt(WIDTH) * F.normalize(torch.randn(2, n, WIDTH), dim=-1)


def norm(x):
    return F.layer_norm(x, (WIDTH,))


def unit(x):
    return F.normalize(x, dim=-1)


def geodesic(x, g, angle):
    v = g - (x * g).sum(-1, keepdim=True) / WIDTH * x
    theta = angle(v.norm(dim=-1, keepdim=True) / 4)
    return x * theta.cos() + unit(v) * 4 * theta.sin()


FORMULAS = {
    "pre_norm": lambda x, f: x + f(norm(x)),
    "pre_rms_norm": lambda x, f: x + f(F.rms_norm(x, x.shape[-1:])),
    "post_norm": lambda x, f: norm(x + f(x)),
    "deep_norm": lambda x, f: norm((2 * LAYERS) ** 0.25 * x + f(x)),
    "sandwich_norm": lambda x, f: x + norm(f(norm(x))),
    "peri_norm": lambda x, f: x + norm(f(norm(x))),
    "geonorm": lambda x, f: geodesic(x, f(x), lambda t: t.clamp_max(math.pi / 4) / (LAYER + 1)),
    "proj_sphere": lambda x, f: 4 * unit(geodesic(x, f(x), torch.atan)),
    "cayley_sphere": lambda x, f: geodesic(x, f(x), lambda t: 2 * torch.atan(t / 2)),
    "p_sphere": lambda x, f: geodesic(x, f(x), lambda t: 2 * torch.atan(t / 2)),
    "ngpt": lambda x, f: 4 * unit(unit(x) + 0.05 * (unit(f(x)) - unit(x))),
}


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_is_its_formula(rule):
    assert rule in FORMULAS, f"add the formula of {rule} to FORMULAS"
    joint, x, f = rule_of(rule).join(STREAM, LAYER), on_sphere(), sublayer()
    assert torch.allclose(joint(x, f), FORMULAS[rule](x, f), atol=2e-6)
    if rule not in SPHERE:  # whose stream may have any length
        assert torch.allclose(joint(3 * x, f), FORMULAS[rule](3 * x, f), atol=2e-6)


WITHOUT_SKIPS = {
    "pre_norm": lambda x, f: f(norm(x)),
    "post_norm": lambda x, f: norm(f(x)),
    "deep_norm": lambda x, f: norm(f(x)),
    "sandwich_norm": lambda x, f: norm(f(norm(x))),
    "peri_norm": lambda x, f: norm(f(norm(x))),
}


@pytest.mark.parametrize("rule", RULES)
def test_without_skips_a_rule_is_its_formula_or_is_refused(rule):
    problems = GPTConfig(residual=rule_of(rule), skips=False).problems()
    assert problems or rule in WITHOUT_SKIPS, f"add the formula of {rule} to WITHOUT_SKIPS, or say why it needs_skips"
    if rule in WITHOUT_SKIPS:
        joint, x, f = rule_of(rule).join(replace(STREAM, skips=False), LAYER), on_sphere(), sublayer()
        assert problems == [] and torch.allclose(joint(x, f), WITHOUT_SKIPS[rule](x, f), atol=2e-6)
    else:
        assert f"residual={rule}, which " in problems[0] and "use model.skips=true" in problems[0]
        assert all(name in problems[0] for name in WITHOUT_SKIPS)


def test_norms_of_a_rule_on_the_sphere_keep_its_radius():
    unit = replace(STREAM, radius=1.0)
    assert rule_of("geonorm", final_norm="rms").exit(unit).radius == 1.0
    assert rule_of("geonorm", input_norm="rms").join(unit, LAYER).norm.radius == 1.0


def test_settings_change_what_they_say():
    x, f = on_sphere(), sublayer()
    join = lambda rule, **changed: rule_of(rule, **changed).join(STREAM, LAYER)(x, f)  # noqa: E731
    assert torch.allclose(
        join("sandwich_norm", depth_gain="sqrt"), x + norm(f(norm(x))) / math.sqrt(LAYER + 1), atol=1e-6
    )
    quarter = geodesic(x, f(x), lambda t: 2 * torch.atan(t * 0.5 * (LAYERS - LAYER) / LAYERS / 2))
    assert torch.allclose(join("cayley_sphere", alpha=0.5, decay="linear"), quarter, atol=1e-6)
    assert torch.allclose(join("p_sphere", p=1.0, learn_p=False), join("proj_sphere"), atol=1e-6)
    assert torch.allclose(
        join("geonorm", decay="none", embedding="none"),
        geodesic(x, f(x), lambda t: t.clamp_max(math.pi / 4)),
        atol=2e-6,
    )
    unit_stream = rule_of("geonorm", radius="unit", input_norm="rms").join(STREAM, LAYER)
    assert torch.allclose(unit_stream(x / 4, f).norm(dim=-1), torch.ones(2, 5), atol=1e-6)
    normed = rule_of("geonorm", embedding="none", input_norm="rms").join(STREAM, LAYER)
    expected = 2 * geodesic(x, f(x) / 2, lambda t: t.clamp_max(math.pi / 4) / (LAYER + 1))
    assert torch.allclose(normed(2 * x, f), expected, atol=4e-6)  # of another length, so the norm acts


@pytest.mark.parametrize("rule", SPHERE)
def test_first_order_is_pre_norms_euler_step_in_the_tangent_direction(rule):
    """Ten times smaller updates leave a hundred times smaller gaps to x + v, with v the tangential part of what pre-norm would add."""
    torch.set_default_dtype(torch.float64)
    try:
        x, direction, gaps = on_sphere(), sublayer()(on_sphere()), []
        for e in (1e-2, 1e-3):
            if rule == "ngpt":  # its step is alpha, toward a point on the sphere
                joint, g, step = rule_of(rule, alpha=e).join(STREAM, 0), 4 * unit(direction), e
            else:
                joint, g, step = rule_of(rule).join(STREAM, 0), e * direction, 1.0
            v = step * (g - (x * g).sum(-1, keepdim=True) / WIDTH * x)
            gaps.append((joint.double()(x, lambda _, g=g: g) - x - v).norm().item())
        assert gaps[1] / gaps[0] == pytest.approx(1e-2, rel=0.1)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", SPHERE)
def test_the_stream_keeps_its_length_through_48_layers(rule, dtype):
    deep = Stream(WIDTH, 48, bias=False, radius=math.sqrt(WIDTH), skips=True)
    x = rule_of(rule).entry(deep)(torch.randn(2, 50, WIDTH)).to(dtype)
    errors = []
    for layer in range(48):
        joint, f = rule_of(rule).join(deep, layer), sublayer(layer, scale=2.0)
        for _ in range(2):
            x = joint(x, lambda h, f=f: f(h.float()).to(dtype))
            errors.append((x.double().norm(dim=-1) / 4 - 1).abs().max().item())
    assert x.dtype == dtype
    assert max(errors) < (1e-5 if dtype == torch.float32 else 2**-8)
    assert sum(errors[-20:]) < 1.5 * sum(errors[:20]) + 1e-6


@pytest.mark.parametrize("norms", ["no", "with"])
def test_the_two_ports_of_geonorm_have_names(norms):
    model = GPT(GPTConfig(**TINY, residual=composed(f"residual=geonorm_{norms}_norms").residual))
    h, names = model.embed(torch.randint(32, (2, 8))), [name for name, _ in model.named_parameters()]
    before = model.transformer.wte.weight.norm(dim=-1).mean()
    if norms == "no":
        assert torch.allclose(h.norm(dim=-1), torch.full((2, 8), math.sqrt(WIDTH)))
        assert composed("residual=geonorm_no_norms").residual == composed("residual=geonorm").residual
    else:
        assert (h.norm(dim=-1) < 3 * before).all()
    gains = [name for name in names if name.endswith(("norm.weight", "ln_f.weight"))]
    assert len(gains) == (0 if norms == "no" else 2 * TINY["n_layer"] + 1)
    wrong = {"pre_norm": "residual.decay is no setting of pre_norm; remove it"}
    wrong["ngpt"] = "residual.rule is 'ngpt', but residual has the settings of another rule"
    for other, message in wrong.items():
        with pytest.raises(ConfigError, match=message):
            check(compose([f"residual=geonorm_{norms}_norms", f"residual.rule={other}"]))


@pytest.mark.parametrize("rule", SPHERE)
def test_gradcheck(rule):
    joint, f = rule_of(rule).join(STREAM, LAYER).double(), torch.nn.Linear(WIDTH, WIDTH).double()
    x = on_sphere(n=1).double()[:1].requires_grad_()
    parameters = [p for p in joint.parameters() if p.requires_grad]
    assert torch.autograd.gradcheck(lambda x, *_: joint(x, f), (x, *parameters))


def test_unit_weights_are_given_a_unit_stream():
    model = GPT(GPTConfig(**TINY, unit_weights=True, residual=rule_of("geonorm")))
    h = model.features(torch.randint(32, (2, 8)))
    assert torch.allclose(h.norm(dim=-1), torch.ones(2, 8), atol=1e-6)
    assert model.transformer.ln_f(h) is h and isinstance(model.transformer.ln_f, nn.Identity)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_every_rule_trains_with_every_assignment(rule, assignment):
    cfg = composed(f"assignment={assignment}", "optim.muon.lr=0.05", "optim.adamw.lr=0.01")
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**TINY, "n_layer": 1}, residual=rule_of(rule)))
    optimizers = build_optimizers(model, cfg)
    x = torch.randint(8, (4, 9))
    losses = []
    for _ in range(4):
        loss = model(x[:, :-1], x[:, 1:])[1]
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizers.step()
        optimizers.zero_grad()
        losses.append(loss.item())
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]


@pytest.mark.parametrize(
    "rule", ["post_norm", "geonorm", "p_sphere", "ngpt"]
)  # one of each kind of joint that is not a sum
def test_one_graph_and_the_same_numbers_when_traced(rule):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**TINY, "n_layer": 1}, residual=rule_of(rule)))
    x = torch.randint(32, (2, 9))
    plain = model(x[:, :-1], x[:, 1:])[1]
    traced = torch.compile(model, backend="aot_eager", fullgraph=True)(x[:, :-1], x[:, 1:])[1]
    assert torch.allclose(plain, traced, atol=1e-6)
    names = [n for n, _ in model.named_parameters()]
    for name, a, b in zip(names, *(torch.autograd.grad(loss, list(model.parameters())) for loss in (plain, traced))):
        assert torch.allclose(a, b, atol=1e-6), name


@pytest.mark.parametrize("rule", SPHERE)
def test_bfloat16_products_leave_a_float32_stream(rule):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**TINY, residual=rule_of(rule)))
    x = torch.randint(32, (2, 8))
    exact = model.features(x)
    with torch.autocast("cpu", torch.bfloat16):
        h = model.features(x)
    assert h.dtype == torch.float32 and torch.allclose(h, exact, atol=0.05)
    assert torch.allclose(h.norm(dim=-1), torch.full((2, 8), math.sqrt(WIDTH)), rtol=1e-6)


def test_deep_norm_initialisation():
    """Xavier's, and β = (8L)^-1/4 on values, output and MLP, not on queries and keys."""
    torch.manual_seed(0)
    config = GPTConfig(block_size=8, vocab_size=32, n_layer=2, n_head=2, n_embd=256, residual=rule_of("deep_norm"))
    block, beta = GPT(config).transformer.h[0], 16**-0.25
    q, k, v = block.attn.c_attn.weight.chunk(3)
    square = (2 / 512) ** 0.5
    for W, std in ((q, square), (k, square), (v, beta * square), (block.attn.c_proj.weight, beta * square)):
        assert W.std().item() == pytest.approx(std, rel=0.02)
    for W in (block.mlp.c_fc.weight, block.mlp.c_proj.weight):
        assert W.std().item() == pytest.approx(beta * (2 / 1280) ** 0.5, rel=0.02)


def test_rotary_scores_depend_on_distance_only():
    model = GPT(GPTConfig(**TINY, rope=True, residual=rule_of("pre_norm")))
    rotary = model.transformer.h[0].attn.rotary
    torch.manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 8).expand(1, 1, 8, 8) for _ in range(2))
    scores = (rotary(q) @ rotary(k).mT)[0, 0]
    for distance in range(8):
        diagonal = scores.diagonal(-distance)
        assert torch.allclose(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5)
    assert (
        "transformer.wpe.weight" not in model.state_dict()
        and model.parameter_count(positions=False) == model.parameter_count()
    )


def test_swiglu_and_an_untied_head():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**TINY, mlp="swiglu", tied=False))
    mlp, x = model.transformer.h[0].mlp, torch.randn(3, WIDTH)
    u, v = mlp.c_fc.weight[: 4 * WIDTH], mlp.c_fc.weight[4 * WIDTH :]
    assert torch.allclose(mlp(x), ((x @ u.T) * F.silu(x @ v.T)) @ mlp.c_proj.weight.T, atol=1e-6)
    assert model.lm_head.weight is not model.transformer.wte.weight
    without_lookup = model.parameter_count(positions=False) - 32 * WIDTH
    assert model.flops_per_token() == 6 * without_lookup + 12 * 2 * WIDTH * 8


@pytest.mark.parametrize(
    ("rule", "changed", "message"),
    [
        ("geonorm", {"decay": "harmonics"}, "residual.decay is 'harmonics'; choose one of harmonic, sqrt"),
        ("geonorm", {"alpha": 1.0}, "residual.alpha is no setting of geonorm"),
        ("p_sphere", {"p": 0}, "residual.p is 0; give a number above 0"),
        ("p_sphere", {"learn_p": "yes"}, "residual.learn_p is 'yes'; choose true or false"),
        ("ngpt", {"rule": "gpt"}, "residual.rule is 'gpt'; choose one of pre_norm"),
    ],
)
def test_bad_settings_are_named_with_their_remedy(rule, changed, message):
    [problem] = RESIDUAL.problems("residual", settings(rule, **changed))
    assert str(problem).startswith(message)


def test_bad_parts_come_at_once_and_a_rule_alone_is_one_problem():
    [problem] = RESIDUAL.problems("residual", {"rule": "ngpt"})
    assert str(problem).endswith("choose all of them with residual=ngpt")
    with pytest.raises(ConfigError) as caught:
        check(compose(["residual=geonorm", "residual.radius=big", "residual.decay=slow", "model.mlp=relu"]))
    assert len(caught.value.problems) == 3
