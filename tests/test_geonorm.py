"""Steps on the sphere: lengths, closed forms, first order, gradients, and the places where formulas divide by zero."""

import math

import pytest
import torch
import torch.nn.functional as F

from optim.geonorm import DECAYS, MAX_ANGLE, geonorm_angle, retraction_angle, rotate, to_sphere

D, LAYERS = 64, 48
ANGLES = {
    "geonorm": lambda t: geonorm_angle(t, 1.0, 0.0, 1.0),
    "geonorm, offset": lambda t: geonorm_angle(t, 0.8, 0.05, 0.5),
    "projection": lambda t: retraction_angle(t, 1.0),
    "cayley": lambda t: retraction_angle(t, 2.0),
    "p = 5.5": lambda t: retraction_angle(t, 5.5),
    "exponential": lambda t: retraction_angle(t, math.inf),
}


def points(n=32, dtype=torch.float64, seed=0, d=D):
    generator = torch.Generator().manual_seed(seed)
    x = to_sphere(torch.randn(n, d, generator=generator, dtype=torch.float64), math.sqrt(d))
    g = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return x.to(dtype), g.to(dtype)


def tangent(x, g):
    return g - (x * g).sum(-1, keepdim=True) / x.square().sum(-1, keepdim=True) * x


def length(x):
    return torch.linalg.vector_norm(x.double(), dim=-1, keepdim=True)


@pytest.mark.parametrize("name", ANGLES)
@pytest.mark.parametrize("size", [1e-6, 1e-2, 1.0, 30.0])
def test_length_is_kept_through_48_layers(name, size):
    x, _ = points(dtype=torch.float32)
    start = length(x)
    for layer in range(2 * LAYERS):
        _, g = points(dtype=torch.float32, seed=layer + 1)
        x = rotate(x, size * g, ANGLES[name])
    assert (length(x) / start - 1).abs().max() < 1e-5


@pytest.mark.parametrize("name", ANGLES)
@pytest.mark.parametrize("noise", [1.0, 1e-2, 1e-4])
def test_length_is_kept_when_the_update_is_nearly_parallel_to_the_point(name, noise):
    """Where ⟨g,g⟩ - ⟨x,g⟩²/⟨x,x⟩ would have lost every digit."""
    x, _ = points(dtype=torch.float32)
    for layer in range(2 * LAYERS):
        _, g = points(dtype=torch.float32, seed=layer + 1)
        x = rotate(x, 3 * x + noise * g, ANGLES[name], radius=math.sqrt(D))
    # An offset turns by a fixed angle along what may be little more than rounding.
    assert (length(x) / math.sqrt(D) - 1).abs().max() < (3e-5 if "offset" in name else 2e-6)


@pytest.mark.parametrize("name", ANGLES)
def test_a_bfloat16_stream_does_not_drift(name):
    """With the radius given, the error after 48 layers is that of one cast; kept from layer to layer it would be many times larger."""
    exact, _ = points(n=256, d=256)
    x = exact.to(torch.bfloat16)
    errors = []
    for layer in range(2 * LAYERS):
        _, g = points(n=256, dtype=torch.bfloat16, seed=layer + 1, d=256)
        x = rotate(x, g, ANGLES[name], radius=16.0)
        assert x.dtype == torch.bfloat16
        errors.append((length(x) / 16 - 1).abs().max().item())
    one_cast = 2**-8  # of every entry, and so at most of the length
    assert max(errors) < one_cast / 4
    assert sum(errors[-10:]) < 1.3 * sum(errors[:10])


@pytest.mark.parametrize("name", ["projection", "cayley", "exponential", "p = 5.5"])
def test_closed_forms(name):
    x, g = points()
    v, R = tangent(x, g), length(x)
    t = length(v) / R
    expected = {
        "projection": lambda: (x + v) / length(x + v) * R,
        "cayley": lambda: ((1 - t**2 / 4) * x + v) / (1 + t**2 / 4),
        "exponential": lambda: x * t.cos() + v / length(v) * R * t.sin(),
        "p = 5.5": lambda: x * (5.5 * (t / 5.5).atan()).cos() + v / length(v) * R * (5.5 * (t / 5.5).atan()).sin(),
    }[name]()
    assert torch.allclose(rotate(x, g, ANGLES[name]), expected, atol=1e-12)


def test_cayley_is_the_cayley_transform_of_a_skew_matrix():
    x, g = points(n=1)
    z = tangent(x, g).squeeze(0)
    h = x.squeeze(0)
    A = (torch.outer(z, h) - torch.outer(h, z)) / h.dot(h)
    eye = torch.eye(D, dtype=torch.float64)
    expected = torch.linalg.solve(eye - A / 2, (eye + A / 2) @ h)
    assert torch.allclose(rotate(x, g, ANGLES["cayley"]).squeeze(0), expected, atol=1e-12)


def test_large_p_is_the_exponential_map_and_small_p_the_identity():
    x, g = points()
    exponential = rotate(x, g, ANGLES["exponential"])
    gaps = [
        (rotate(x, g, lambda t, p=p: retraction_angle(t, p)) - exponential).abs().max().item() for p in (10, 100, 1000)
    ]
    assert gaps[1] / gaps[0] == pytest.approx(1e-2, rel=0.05) and gaps[2] / gaps[1] == pytest.approx(1e-2, rel=0.05)
    assert torch.allclose(rotate(x, g, lambda t: retraction_angle(t, 1e-9)), x, atol=1e-7)
    t = torch.tensor([[1e8]], dtype=torch.float64)
    for p in (1.0, 2.0, torch.tensor(3.0)):
        assert retraction_angle(t, p).item() == pytest.approx(float(p) * math.pi / 2, rel=1e-6)


@pytest.mark.parametrize("name", [n for n in ANGLES if n != "geonorm, offset"])
def test_first_order_is_the_euler_step(name):
    """x' = x + εv + O(ε²): ten times smaller steps leave a hundred times smaller gaps."""
    x, g = points()
    gaps = [(rotate(x, e * g, ANGLES[name]) - x - e * tangent(x, g)).norm().item() for e in (1e-2, 1e-3)]
    assert gaps[1] / gaps[0] == pytest.approx(1e-2, rel=0.05)


def test_geonorm_is_its_published_formula():
    x, g = points()
    scale, offset, decay = 1.3, 0.04, 0.25
    c = (x * g).sum(-1, keepdim=True) / x.square().sum(-1, keepdim=True).clamp_min(1e-12)
    v = g - c * x
    u, R = v / length(v).clamp_min(1e-8), length(x).clamp_min(1e-6)
    for g_scale in (0.02, 1.0, 50.0):
        theta = (length(g_scale * v) / R).clamp_max(math.pi / 4)
        theta = ((theta * scale + offset) * decay).clamp_max(math.pi / 4)
        expected = x * theta.cos() + u * R * theta.sin()
        step = rotate(x, g_scale * g, lambda t: geonorm_angle(t, scale, offset, decay))
        assert torch.allclose(step, expected, atol=1e-12)


def test_geonorm_clamps_from_above_only():
    t = torch.tensor([0.1, 1.0, 100.0])
    assert torch.equal(geonorm_angle(t, 1.0, 0.0, 1.0), torch.tensor([0.1, MAX_ANGLE, MAX_ANGLE]))
    assert geonorm_angle(t, 10.0, 0.0, 1.0).max() <= MAX_ANGLE
    assert geonorm_angle(t, 1.0, -0.5, 1.0)[0] < 0


def test_the_offset_fades_out_below_a_thousandth():
    t = torch.tensor([0.0, 5e-4, 1e-3, 2e-3], dtype=torch.float64)
    assert torch.allclose(geonorm_angle(t, 1.0, 0.05, 1.0) - t, 0.05 * torch.tensor([0, 0.5, 1, 1]).double())


def test_decays():
    table = {name: [decay(layer, 4) for layer in range(4)] for name, decay in DECAYS.items()}
    assert table["harmonic"] == [1, 1 / 2, 1 / 3, 1 / 4] and table["linear"] == [1, 3 / 4, 2 / 4, 1 / 4]
    assert table["sqrt"] == pytest.approx([1, 2**-0.5, 3**-0.5, 0.5]) and table["none"] == [1] * 4
    assert table["cosine"] == pytest.approx([1, 0.5 + 0.5**0.5 / 2, 0.5, 0.5 - 0.5**0.5 / 2])


@pytest.mark.parametrize("radius", [None, 2.5])
@pytest.mark.parametrize("name", ANGLES)
def test_gradients(name, radius):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    g = (0.3 * torch.randn(3, 5, generator=generator, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, g: rotate(x, g, ANGLES[name], radius), (x, g))


def test_gradients_of_the_learned_numbers():
    x, g = (u[:3, :5].clone() for u in points())
    parameters = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.9, 0.02, 3.0)]
    assert torch.autograd.gradcheck(
        lambda s, b, p: (
            rotate(x, 0.1 * g, lambda t: geonorm_angle(t, s, b, 0.5)),
            rotate(x, g, lambda t: retraction_angle(t, p)),
        ),
        parameters,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ANGLES)
def test_zero_update_is_the_identity_with_the_euler_steps_gradient(name, dtype):
    x, out = points(dtype=dtype)
    x.requires_grad_()
    for g in (torch.zeros_like(x), -2.0 * x.detach()):  # nothing, and nothing tangential
        g = g.detach().requires_grad_()
        step = rotate(x, g, ANGLES[name])
        rounding = (
            32 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        )  # a step is computed in float32 at least
        rounding *= 50 if "offset" in name else 1  # turned along it by the offset, as far as that has faded
        assert torch.equal(step, x) if not g.any() else torch.allclose(step, x, rtol=0, atol=rounding)
        dx, dg = torch.autograd.grad(step, (x, g), out)
        assert dx.isfinite().all() and dg.isfinite().all()
        if dtype == torch.float64 and "offset" not in name and not g.any():
            assert torch.allclose(dg, tangent(x, out), atol=1e-9)


@pytest.mark.parametrize("name", ANGLES)
def test_gradient_is_bounded_near_a_zero_update(name):
    """The direction of a tiny update is noise; nothing may amplify its gradient, in float32 too."""
    x, g = points(dtype=torch.float32)
    for size in (1e-3, 1e-6, 1e-9, 1e-13, 1e-20):
        update = (size * g).requires_grad_()
        (dg,) = torch.autograd.grad(rotate(x, update, ANGLES[name]), update, g)
        assert (length(dg) / length(g)).max() < 40


def test_antipode_is_reached_smoothly():
    """A rotation by π lands on -x, where the direction of the plane no longer matters; the gradient stays that of a rotation."""
    x, g = points()
    v = tangent(x, g)
    v = (v / length(v) * math.pi * length(x)).requires_grad_()
    step = rotate(x, v, ANGLES["exponential"])
    assert torch.allclose(step, -x, atol=1e-12)
    (dv,) = torch.autograd.grad(step, v, g)
    assert dv.isfinite().all() and (length(dv) <= length(g)).all()
    far = (1e6 * v.detach()).requires_grad_()  # Cayley's limit
    step = rotate(x, far, ANGLES["cayley"])
    assert torch.allclose(step, -x, atol=1e-4)
    assert torch.autograd.grad(step, far, g)[0].isfinite().all()


@pytest.mark.parametrize("radius", [None, 8.0])
@pytest.mark.parametrize("name", ANGLES)
def test_padding_gives_no_nan(name, radius):
    x = torch.zeros(2, D).requires_grad_()
    for g in (torch.zeros(2, D), torch.ones(2, D)):
        g = g.requires_grad_()
        h = x
        for _ in range(LAYERS):
            h = rotate(h, g, ANGLES[name], radius)
        grads = torch.autograd.grad(h.sum(), (x, g))
        assert h.isfinite().all() and all(u.isfinite().all() for u in grads)
        assert not h.any()


def test_to_sphere():
    x, _ = points(dtype=torch.float32)
    assert torch.allclose(length(to_sphere(0.01 * x, 3.0)), torch.tensor(3.0, dtype=torch.float64), rtol=1e-6)
    assert torch.allclose(to_sphere(x), F.normalize(x, dim=-1), atol=1e-7)
    zero = torch.zeros(2, D, requires_grad=True)
    y = to_sphere(zero)
    assert not y.any() and torch.autograd.grad(y.sum(), zero)[0].isfinite().all()
    short = torch.tensor([[2e-6, 0.0], [5e-7, 0.0]])  # above and below the length that has a direction
    assert torch.equal(to_sphere(short), torch.tensor([[1.0, 0.0], [5e-7, 0.0]]))
    tiny = torch.randn(3, 5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: to_sphere(x, 2.0), tiny)


def test_second_derivatives_are_refused():
    """The backward passes save what they computed, which a second derivative would take for constant."""
    x, g = (t.requires_grad_() for t in points())
    for loss in (to_sphere(x).sin().sum(), rotate(x, g, torch.atan).sin().sum()):
        with pytest.raises(RuntimeError, match="leave out create_graph=True"):
            torch.autograd.grad(loss, x, create_graph=True)
