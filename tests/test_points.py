"""Points of the map of optimizers: sets without a Gram projector, refined directions, and steps of blocks as long as the whole."""

import math
from pathlib import Path

import pytest
import torch

from optim.certificate import StepProblem, certify
from optim.certified import CertifiedStep, direction
from optim.manifold_muon import ManifoldMuon
from optim.manifolds import MANIFOLDS, distance_of
from optim.monitor import Monitor
from optim.msign import msign
from optim.published import PublishedStep
from optim.refine import Refine
from optim.stack import Moved, Stack
from training.build import build
from training.checks import check
from training.config import compose
from training.validate import ConfigError

NEW = ["hyperball", "spectral_ball", "spectral_sphere", "oblique_gain"]
SPHERES = ["hyperball", "spectral_sphere"]  # one normal direction
RULES = {"certified": CertifiedStep(), "published": PublishedStep(3, 0.1, 10, torch.float32)}


def gaussian(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def stack_of(W, G, manifold, eta=0.05, decay=0.0):
    level = torch.zeros(len(W))
    return Stack(W, G, manifold, torch.tensor(eta), decay, torch.tensor(False), level, 0)


# ---- the sets ----


@pytest.mark.parametrize("shape", [(24, 9), (9, 24), (12, 12), (2, 24, 9)])
@pytest.mark.parametrize("name", NEW)
def test_the_retraction_lands_and_keeps_what_is_there(name, shape):
    M, W = MANIFOLDS[name], gaussian(*shape, dtype=torch.float64)
    R = M.retract(W)
    assert R.shape == W.shape and M.distance(R).max() < 1e-12 and torch.allclose(M.retract(R), R, atol=1e-12)
    inside = MANIFOLDS["spectral_ball"].retract(0.01 * W)
    assert torch.allclose(inside, 0.01 * W, atol=1e-15)


def test_the_ball_is_reached_at_its_nearest_point():
    W = gaussian(20, 8, dtype=torch.float64)
    U, s, Vh = torch.linalg.svd(W, full_matrices=False)
    assert torch.allclose(MANIFOLDS["spectral_ball"].retract(W), U * s.clamp_max(1) @ Vh)
    for top in (1.0, 1.1, 1.5, 5.0):  # whatever the length of the step
        sizes = torch.linspace(0.0, top, 8, dtype=torch.float64)
        V, near = (U * sizes) @ Vh, (U * sizes.clamp_max(1)) @ Vh
        moved = MANIFOLDS["spectral_ball"].move(V[None].float(), None, torch.zeros(1, 20, 8), torch.zeros(()), 1.0)[0]
        assert (moved - near).abs().max() < 5e-6


def test_gains_stay_where_they_are_under_gradients_of_random_sign():
    M, W = MANIFOLDS["oblique_gain"], torch.eye(6, 4)[None]
    signs = torch.ones(200).index_fill(0, torch.randperm(200)[:100], -1.0)
    for sign in signs:
        W = M.move(W, sign * W, torch.zeros(1, 6, 4), torch.tensor(0.05), torch.tensor(1.0))
    assert torch.allclose(W, torch.eye(6, 4), atol=1e-4)


def test_gains_are_refused_where_a_matrix_starts_at_zero():
    with pytest.raises(
        ConfigError, match=r"'transformer.h.0.attn.c_proj.weight' starts at zero with residual=pre_rms_norm"
    ):
        check(compose(["assignment=all_oblique_gain", "residual=pre_rms_norm"]))
    check(compose(["assignment=all_hyperball", "residual=pre_rms_norm"]))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", NEW)
def test_steps_stay_on_the_set_and_descend(name, rule):
    """To the nearest point of the set that is reached: ‖W - target‖ falls, and the weights stay where they belong."""
    M = MANIFOLDS[name]
    W, target = M.retract(gaussian(3, 24, 9)), 0.5 * gaussian(3, 24, 9, seed=1)
    before = (W - target).norm()
    for step in range(30):
        moved = RULES[rule](stack_of(W, W - target, name, eta=0.1 * (1 - step / 30)))
        W = moved.W
    assert M.distance(W).max() < 1e-4
    best = (M.retract(target) - target).norm() if name != "spectral_sphere" else 0.6 * before
    assert (W - target).norm() < min(0.9 * before, 1.5 * best + 0.3 * before)


def normal_at(W, name):
    """The unit normal of one matrix, as the maths has it: the gradient of the norm that is fixed."""
    if name == "hyperball":
        return W / W.norm()
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    return torch.outer(U[:, 0], Vh[0])


def optimum(G, N):
    """max ⟨G, T⟩ with ‖T‖₂ ≤ 1, ⟨N, T⟩ = 0, by its dual: the least ‖G + L·N‖_* over numbers L, which is convex; by ternary search."""
    low, high = -4 * G.norm(), 4 * G.norm()
    for _ in range(80):
        a, b = low + (high - low) / 3, high - (high - low) / 3
        if torch.linalg.matrix_norm(G + a * N, "nuc") < torch.linalg.matrix_norm(G + b * N, "nuc"):
            high = b
        else:
            low = a
    return torch.linalg.matrix_norm(G + low * N, "nuc")


@pytest.mark.parametrize("pull", [0.0, 2.0])  # how much of the momentum is normal
@pytest.mark.parametrize("name", SPHERES)
def test_directions_on_spheres_are_tangent_feasible_and_near_the_optimum(name, pull):
    M = MANIFOLDS[name]
    W = M.retract(gaussian(2, 30, 10, dtype=torch.float64))
    N = torch.stack([normal_at(w, name) for w in W])
    G = gaussian(2, 30, 10, seed=1, dtype=torch.float64)
    G = G + pull * G.norm(dim=(-2, -1), keepdim=True) * N
    for quality, share in (("default", 0.95), ("high", 0.96)):
        T = direction(W, G, name, quality=quality)
        assert torch.linalg.matrix_norm(T, 2).max() < 1 + 1e-6
        assert (T * N).sum((-2, -1)).abs().max() < 1e-5
        best = torch.stack([optimum(g, n) for g, n in zip(G, N)])
        value = (G * T).sum((-2, -1))
        assert (value > share * best).all() and (value <= best * (1 + 1e-9)).all()
        certificate = certify(W, G, T, name)
        assert torch.allclose(certificate.feas, value / best, rtol=2e-2) and certificate.tangency.max() < 1e-5


def uneven(name, seed):
    """A point whose columns have lengths from .1 to 1, and momentum mostly of rank two with a part along the point."""
    M = MANIFOLDS[name]
    W = M.retract(gaussian(2, 30, 10, seed=seed, dtype=torch.float64) * torch.linspace(0.1, 1, 10))
    G = gaussian(2, 30, 2, seed=seed + 1, dtype=torch.float64) @ gaussian(2, 2, 10, seed=seed + 2, dtype=torch.float64)
    return W, G + 0.05 * gaussian(2, 30, 10, seed=seed + 3, dtype=torch.float64) + W * G.norm() / W.norm()


@pytest.mark.parametrize("name", SPHERES)
def test_the_certificates_bound_is_above_the_optimum_and_near_it(name):
    for seed in range(0, 20, 4):
        W, G = uneven(name, seed)
        best = torch.stack([optimum(g, normal_at(w, name)) for g, w in zip(G, W)])
        problem = StepProblem(*MANIFOLDS[name].problem(W, G))
        bound = (problem.scale * problem.dual_value()).flatten()
        assert (bound >= best * (1 - 1e-9)).all() and (bound <= 1.01 * best).all()
        for quality in ("default", "high"):
            value = (G * direction(W, G, name, quality=quality)).sum((-2, -1))
            assert (value > 0.94 * best).all()


@pytest.mark.parametrize("name", ["oblique", "oblique_gain"])
def test_directions_on_oblique_are_near_the_best_for_momentum_of_low_rank(name):
    for seed in range(0, 20, 4):
        W, G = uneven(name, seed)
        for quality, least in (("default", 0.9), ("high", 0.92)):
            assert certify(W, G, direction(W, G, name, quality=quality), name).feas.min() > least


@pytest.mark.parametrize("name", ["stiefel", "dgram", "oblique", "hyperball"])
def test_a_su_step_keeps_the_multiplier_where_the_condition_is(name):
    M = MANIFOLDS[name]
    problem = StepProblem(*uneven("hyperball", 1), M)
    L = problem.least_squares()
    _, H, Z = problem.sign_at(L)
    for X in (L, problem.su_step(H, Z)):
        assert X.norm() > 0 and torch.allclose(M.project(X), X, rtol=0, atol=1e-12 * X.norm())


def test_the_tangent_part_leaves_the_norm_as_it_is():
    for name in SPHERES:
        M, W = MANIFOLDS[name], MANIFOLDS[name].retract(gaussian(9, 24, dtype=torch.float64))
        A = M.tangent(W, gaussian(9, 24, seed=3, dtype=torch.float64))
        drift = [M.distance(W + t * A).item() for t in (1e-3, 5e-4)]
        assert drift[0] / drift[1] == pytest.approx(4, rel=0.1)  # second order


def test_gains_and_unit_columns_step_apart():
    W, G = gaussian(2, 24, 9), gaussian(2, 24, 9, seed=1)
    c = W.norm(dim=-2, keepdim=True)
    T = direction(W / c, G * c, "oblique")
    moved = RULES["certified"](stack_of(W, G, "oblique_gain", eta=0.1, decay=0.5))
    assert torch.allclose(moved.direction, T, atol=0.02)  # up to the estimate of ‖T‖₂
    U = W / c - 0.1 * moved.direction
    gains = c * (1 - 0.1 * 0.5) * torch.exp(-0.1 * (W * G).sum(-2, keepdim=True).sign())
    assert torch.allclose(moved.W, U / U.norm(dim=-2, keepdim=True) * gains, atol=1e-5)
    assert torch.allclose(moved.W.norm(dim=-2, keepdim=True), gains, rtol=1e-5)
    assert certify(W, G, moved.direction, "oblique_gain").feas.min() > 0.9


# ---- refined directions ----


def optimizer_of(params, **options):
    common = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.0}
    group = {
        "params": params,
        "names": [f"p{i}" for i in range(len(params))],
        "manifold": options.pop("manifold", "euclidean"),
    }
    group |= {key: options.pop(key) for key in ("blocks", "radius") if key in options}
    return ManifoldMuon([group], CertifiedStep(), **{**common, **options})


def parameters(*shapes):
    return [torch.nn.Parameter(gaussian(*shape, seed=i) / 4) for i, shape in enumerate(shapes)]


def steps_of(params, optimizer, count=3):
    """The change of every parameter in each of some steps."""
    found = []
    for step in range(count):
        before = [p.detach().clone() for p in params]
        for i, p in enumerate(params):
            p.grad = gaussian(*p.shape, seed=100 + 10 * step + i)
        optimizer.step()
        found.append([p.detach() - old for p, old in zip(params, before)])
    return found


def test_rows_are_normalised_by_their_mean_square_over_time():
    """Against NorMuon one matrix at a time, rows of the parameter as it stands, tall and wide in one group."""
    shapes = [(24, 9), (9, 24), (24, 9)]
    params, beta = parameters(*shapes), 0.8
    optimizer = optimizer_of(params, row_beta=beta)
    assert [tuple(optimizer.state[p]["row_squares"].shape) for p in params] == [(1, 24), (1, 9), (1, 24)]
    momenta, squares = [torch.zeros(s) for s in shapes], [torch.zeros(s[0]) for s in shapes]
    for step, changes in enumerate(steps_of(params, optimizer)):
        for i, change in enumerate(changes):
            g = gaussian(*shapes[i], seed=100 + 10 * step + i)
            momenta[i] = 0.9 * momenta[i] + g
            T = msign(g + 0.9 * momenta[i], 12, torch.float64).float()
            squares[i] = beta * squares[i] + (1 - beta) * T.square().mean(1)
            R = T / squares[i].sqrt()[:, None]
            expected = -0.1 * R * T.norm() / R.norm()
            assert (change - expected).norm() < 0.03 * expected.norm()
            assert change.norm() == pytest.approx(expected.norm().item(), rel=1e-2)
    sizes = torch.stack([row.norm() for row in changes[1]])
    assert sizes.std() < 0.3 * sizes.mean()


def test_the_cautious_step_goes_against_no_gradient_and_is_as_long():
    plain, cautious = (
        steps_of(p := parameters((24, 9), (9, 24)), optimizer_of(p, cautious=on)) for on in (False, True)
    )
    for step, (before, after) in enumerate(zip(plain, cautious)):
        for i, (a, b) in enumerate(zip(before, after)):
            g = gaussian(*a.shape, seed=100 + 10 * step + i)
            assert (b * g <= 0).all() and b.norm() == pytest.approx(a.norm().item(), rel=1e-3)
            kept = b != 0
            assert 0.5 < kept.float().mean() < 1 and torch.allclose(
                b[kept] / a[kept], (b[kept] / a[kept]).mean(), rtol=1e-2
            )


@pytest.mark.parametrize("manifold", ["stiefel", "dgram", "hyperball", "spectral_sphere", "oblique_gain"])
def test_refined_directions_stay_tangent(manifold):
    params = parameters((24, 9), (9, 24))
    optimizer = optimizer_of(params, manifold=manifold, cautious=True, row_beta=0.9)
    steps_of(params, optimizer)
    for bucket in optimizer.buckets:
        assert not bucket.state["fallbacks"].any()
    assert all(MANIFOLDS[manifold].distance(p.detach()).max() < 1e-4 for p in params)
    optimizer.watched = True
    steps_of(params, optimizer, 1)
    assert all(seen["tangency"] < 1e-5 for seen in optimizer.certificates().values())


def test_the_mask_acts_after_the_rows_and_a_row_that_never_moved_stays():
    T, g = gaussian(1, 6, 4), gaussian(1, 6, 4, seed=1)
    T[:, 2] = 0
    (plain, squares), (masked, same) = (
        Refine(mask, torch.zeros(1, 6), 0.9, False)(T, T, MANIFOLDS["euclidean"]) for mask in (None, g)
    )
    assert torch.equal(same, squares) and torch.allclose(squares, 0.1 * T.square().mean(-1))
    assert not plain[:, 2].any() and not masked[:, 2].any()
    assert torch.allclose(masked, torch.where(plain * g > 0, plain, 0) * T.norm() / plain[plain * g > 0].norm())
    faint, _ = Refine(1e-41 * T, None, 0.0, False)(T, T, MANIFOLDS["euclidean"])
    assert torch.allclose(faint, T)  # all signs agree


def test_the_mean_squares_are_saved_and_a_skipped_step_leaves_them():
    params, twins = parameters((24, 9), (9, 24)), parameters((24, 9), (9, 24))
    first, second = optimizer_of(params, row_beta=0.9), optimizer_of(twins, row_beta=0.9)
    steps_of(params, first, 2)
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        torch._foreach_copy_(twins, params)
    for a, b in zip(steps_of(params, first, 1)[0], steps_of(twins, second, 1)[0]):
        assert torch.equal(a, b)
    kept = [first.state[p]["row_squares"].clone() for p in params]
    first.found_inf = torch.ones(())
    steps_of(params, first, 1)
    assert all(torch.equal(first.state[p]["row_squares"], old) for p, old in zip(params, kept))
    assert "row_squares" not in optimizer_of(parameters((24, 9))).state_dict()["state"][0]


def test_a_direction_that_was_not_taken_is_zero_whatever_it_is():
    T, scale = torch.tensor([[[1.0]], [[math.nan]]]), torch.tensor([[[2.0]], [[0.0]]])
    assert Moved(T, T, scale, *[torch.zeros(2)] * 2).direction.flatten().tolist() == [2.0, 0.0]


def test_the_mean_squares_leave_out_a_direction_that_was_not_taken():
    p = torch.nn.Parameter(0.01 * torch.eye(8, 3))
    optimizer = optimizer_of([p], manifold="dgram", row_beta=0.9)
    p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    before = p.detach().clone()
    optimizer.step()
    assert torch.equal(p, before) and not optimizer.state[p]["row_squares"].any()  # the trial point did not land
    optimizer.step()  # exactly
    assert not torch.equal(p, before) and optimizer.state[p]["row_squares"].all()


def test_a_certificate_tells_a_step_uphill_and_nan_of_any_block():
    params = parameters((12, 4), (12, 4))
    optimizer = optimizer_of(params, blocks=2)
    optimizer.watched = True
    steps_of(params, optimizer, 1)
    [bucket] = optimizer.buckets
    W, G, T = bucket.seen
    assert all(seen["feas"] > 0 for seen in optimizer.certificates().values())
    signs = torch.tensor([1.0, -1.0, 1.0, 1.0])[:, None, None]  # of four blocks, two of each parameter
    bucket.seen = W, torch.where(torch.arange(4)[:, None, None] == 3, torch.nan, G), signs * T
    uphill, broken = optimizer.certificates().values()
    assert uphill["feas"] < 0 and math.isnan(broken["feas"]) and math.isnan(broken["momentum_top"])


def test_a_step_calls_its_closure_and_returns_its_loss():
    [p] = params = parameters((12, 4))
    optimizer, before = optimizer_of(params), p.detach().clone()

    def closure():
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == before.square().sum().item() and not torch.equal(p, before)


def test_a_group_without_matrices_is_refused():
    with pytest.raises(ValueError, match="a parameter group has no matrices; leave it out"):
        optimizer_of([])


# ---- blocks ----


@pytest.mark.parametrize("shape", [(36, 12), (12, 36), (24, 24)])
@pytest.mark.parametrize("blocks", [3, 12])
@pytest.mark.parametrize("length", ["spectral", "rms"])
def test_blocks_together_step_as_far_as_the_whole(shape, blocks, length):
    def moved(**options):
        params = parameters(shape)
        optimizer = optimizer_of(params, **options)
        optimizer.rule = CertifiedStep("high", length=length)
        return steps_of(params, optimizer, 1)[0][0].norm().item()

    whole = moved()
    assert moved(blocks=blocks, block_length="whole") == pytest.approx(whole, rel=2e-2)
    ranks = blocks * min(shape[0] // blocks, shape[1]) / min(shape)
    longer = (
        ranks**0.5 if length == "spectral" else 1.0
    )  # by the root mean square blocks are as long as the whole anyway
    assert moved(blocks=blocks, block_length="each") == pytest.approx(longer * whole, rel=2e-2)
    assert moved(block_length="whole") == whole


# ---- the radius ----


@pytest.mark.parametrize("manifold", ["stiefel", "oblique", *SPHERES, "spectral_ball"])
def test_a_radius_is_the_same_step_of_a_larger_matrix(manifold):
    small = parameters((24, 9), (9, 24))
    large = [torch.nn.Parameter(4 * p.detach()) for p in small]
    one = optimizer_of(small, manifold=manifold, weight_decay=0.4)
    four = optimizer_of(large, manifold=manifold, weight_decay=0.1, lr=0.4, radius=4.0)
    for seed in range(4):
        for p, q in zip(small, large):
            p.grad = q.grad = gaussian(*p.shape, seed=seed)
        one.step()
        four.step()
    distance = distance_of(manifold, 4.0)
    for p, q in zip(small, large):
        assert torch.equal(4 * p.detach(), q) and distance(q).max() < 1e-5
    report = Monitor(four, interval=1).report()
    assert not report.off(1e-4) and max(seen.largest for seen in report.values()) > 1.5
    four.found_inf, before = torch.ones(()), [q.clone() for q in large]
    four.step()
    assert all(map(torch.equal, before, large))


def test_a_radius_by_name():
    small = ["model.n_layer=1", "model.n_embd=16", "model.n_head=2", "model.block_size=16"]
    cfg = compose(["assignment=all_spectral_sphere", *small, "optim.muon.radius={c_fc: 3}"])
    check(cfg)
    model, optimizers = build(cfg)
    weights = {row.name: model.get_parameter(row.name).detach() for row in optimizers.rows if row.manifold}
    sizes = {name: torch.linalg.matrix_norm(W, 2).item() for name, W in weights.items()}
    assert sizes == {name: pytest.approx(3 if "c_fc" in name else 1, rel=1e-5) for name in weights}
    assert "spectral_sphere, radius 3" in {row.geometry for row in optimizers.rows}
    assert all(residual(W) < 1e-5 for W, residual, _ in optimizers.ruled_matrices(dict(weights)).values())
    for radius, assignment in (("{attn: 2}", "all_dgram"), ("{attn: 0}", "all_stiefel")):
        with pytest.raises(ConfigError, match="give a number above 0"):
            check(compose([f"assignment={assignment}", f"optim.muon.radius={radius}"]))


# ---- the configuration ----


def test_the_start_of_a_run_names_cuts_and_options():
    small = ["model.n_layer=1", "model.n_embd=16", "model.n_head=2", "model.block_size=16"]
    cut = ["optim.muon.blocks={c_attn: 3}", "optim.muon.block_length=whole"]
    _, plain = build(compose(["assignment=all_stiefel", *small]))
    _, given = build(
        compose([*small, "assignment=all_stiefel", *cut, "optim.muon.cautious=true", "optim.muon.row_beta=0.9"])
    )
    geometry = {row.name: row.geometry for row in given.rows if row.manifold}
    assert geometry.pop("transformer.h.0.attn.c_attn.weight") == "stiefel, 3 blocks"
    assert set(geometry.values()) == {row.geometry for row in plain.rows if row.manifold} == {"stiefel"}
    cpu = torch.device("cpu")
    options = "cautious, rows normalised by squares of decay 0.9, blocks step as far as the whole"
    assert given.muon.describe(cpu) == f"{plain.muon.describe(cpu)}, {options}"


ASSIGNMENTS = ["all_hyperball", "all_spectral_ball", "all_spectral_sphere", "all_oblique", "all_oblique_gain"]


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_every_point_trains_by_name(assignment):
    torch.manual_seed(0)
    small = ["model.n_layer=1", "model.n_embd=16", "model.n_head=2", "model.block_size=16"]
    options = [
        "optim.muon.cautious=true",
        "optim.muon.row_beta=0.95",
        "optim.muon.blocks={c_attn: 3}",
        "optim.muon.block_length=whole",
    ]
    for own in ([], options):
        cfg = compose([f"assignment={assignment}", *small, *own])
        check(cfg)
        model, optimizers = build(cfg)
        x = torch.randint(257, (4, 17), generator=torch.Generator().manual_seed(0))
        losses = []
        for _ in range(8):
            loss = model(x[:, :-1], x[:, 1:])[1]
            loss.backward()
            optimizers.step()
            optimizers.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0] - 0.1
        [manifold] = {row.manifold for row in optimizers.rows if row.manifold}
        for row in optimizers.rows:
            if row.manifold and not (own and "c_attn" in row.name):
                assert MANIFOLDS[manifold].distance(model.get_parameter(row.name).detach()).max() < 1e-3


def test_the_published_rule_refuses_the_options():
    options = ["optim.muon.cautious=true", "optim.muon.row_beta=0.95", "optim.muon.block_length=whole"]
    with pytest.raises(ConfigError, match="3 problems") as refused:
        check(compose(["optim=paper", *options]))
    assert "optim.muon.row_beta is an option of the certified step" in str(refused.value)
    with pytest.raises(ValueError, match="the published step has no whole"):
        RULES["published"](stack_of(gaussian(1, 8, 4), gaussian(1, 8, 4), "euclidean")._replace(whole=(8, 4)))


def test_every_set_has_an_assignment():
    named = {path.stem for path in (Path(__file__).parent.parent / "configs" / "assignment").glob("all_*.yaml")}
    assert named >= {f"all_{name}" for name in ("stiefel", "dgram", "oblique", *NEW)}
