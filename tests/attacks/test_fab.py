import pytest
import torch
from arena_attacks.hyperplane import ascending, displacement
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize


def exact(norm, x, w, c):
    """Distance to {<w, z> = <w, x> + c} within the box by a general solver; None where it cannot be reached."""
    x, w = x.double().numpy(), w.double().numpy()
    d = len(x)
    if norm == "Linf":  # min t, |delta_i| <= t
        a = [[*row, -1.0] for row in torch.eye(d).tolist()] + [[*row, -1.0] for row in (-torch.eye(d)).tolist()]
        bounds = [(-v, 1 - v) for v in x] + [(0, None)]
        found = linprog([0.0] * d + [1.0], A_ub=a, b_ub=[0.0] * (2 * d), A_eq=[[*w, 0.0]], b_eq=[c], bounds=bounds)
        return found.fun if found.status == 0 else None
    reach = sum(max(v * (1 - p), -v * p) if c > 0 else -min(v * (1 - p), -v * p) for v, p in zip(w, x, strict=True))
    if reach < abs(c):
        return None
    start = [(1 - p if (v > 0) == (c > 0) else -p) * abs(c) / reach for v, p in zip(w, x, strict=True)]
    found = minimize(
        lambda z: (z**2).sum(),
        start,
        jac=lambda z: 2 * z,
        bounds=[(-p, 1 - p) for p in x],
        constraints={"type": "eq", "fun": lambda z: w @ z - c, "jac": lambda z: w},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    return float(found.fun) ** 0.5


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["Linf", "L2"]), st.integers(1, 9), st.floats(0.02, 0.98))
def test_displacement_is_the_shortest_way(seed, norm, d, share):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(1, d, generator=g)
    x[x < 0.15] = 0  # pixels on the box's face
    w = torch.randn(1, d, generator=g)
    sign = 1.0 if seed % 2 else -1.0
    most = torch.where(sign * w > 0, 1 - x, x).mul(w.abs()).sum()
    if most < 1e-3:
        return
    c = sign * share * most
    delta = displacement(norm, x, w, c.view(1))
    assert ((x + delta) >= -1e-6).all()
    assert ((x + delta) <= 1 + 1e-6).all()
    assert (w * delta).sum().item() == pytest.approx(c.item(), rel=1e-4, abs=1e-5)
    length = delta.abs().max() if norm == "Linf" else delta.norm()
    assert length.item() == pytest.approx(exact(norm, x[0], w[0], c.item()), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_displacement_goes_to_the_corner_where_the_plane_misses_the_box(norm):
    x, w = torch.tensor([[0.25, 0.5, 0.9]]), torch.tensor([[1.0, -2.0, 0.0]])
    delta = displacement(norm, x, w, torch.tensor([5.0]))
    assert torch.allclose(x + delta, torch.tensor([[1.0, 0.0, 0.9]]))
    assert torch.equal(displacement(norm, x, torch.zeros(1, 3), torch.tensor([5.0])), torch.zeros(1, 3))
    assert torch.equal(displacement(norm, x, w, torch.zeros(1)), torch.zeros(1, 3))


def true_distance(fight):
    """Distance to the nearest decision boundary of a linear model inside the box."""
    layer, x = fight.target.model[1], fight.x.flatten(1)
    z = fight.target.logits(fight.x)
    best = torch.full((len(fight.y),), torch.inf)
    for k in range(layer.out_features):
        w = layer.weight[k] - layer.weight[fight.y]
        need = z.gather(1, fight.y[:, None]).squeeze(1) - z[:, k]
        delta = displacement(fight.threat.norm, x, w, need)
        length = delta.abs().amax(1) if fight.threat.norm == "Linf" else delta.norm(dim=1)
        reaches = (w * delta).sum(1) >= need - 1e-3
        best = best.minimum(length.where((fight.y != k) & reaches, torch.inf))
    return best


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 4, 5)])
def test_finds_the_distance_to_a_linear_boundary(fight, models, norm, classes, shape):
    f = fight("fab_t", models.linear(shape, classes), shape=shape, norm=norm, eps="1/1000000", steps=30)
    state = {**f.attack.start(f.index, f.x, f.y, f.target.clean(f.x)), "x": f.x, "y": f.y, "index": f.index}
    while not state["done"].all():
        owned = {k: state[k] for k in ("x", "y", "index")}
        state = {**f.attack.tell(state, f.target.answer(f.attack.ask(state), f.y)), **owned}
    truth = true_distance(f)
    assert torch.isfinite(truth).all()
    assert (state["norm"] >= truth * 0.999).all()
    assert (state["norm"] <= truth * 1.03).all()
    assert (f.target.logits(state["nearest"]).argmax(1) != f.y).all()


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_breaks_what_lies_within_eps_and_nothing_else(fight, models, norm):
    probe = fight("fab_t", models.linear((1, 6, 6), 4), shape=(1, 6, 6), norm=norm, eps="0.1", n=24)
    truth = true_distance(probe)
    eps = f"{truth.sort().values[11:13].mean().item():.6f}"
    f = fight("fab_t", models.linear((1, 6, 6), 4), shape=(1, 6, 6), norm=norm, eps=eps, n=24)
    outcome = f.run()
    broken = f.broken(outcome)
    assert broken[truth < 0.97 * f.threat.radius].all()
    assert not broken[truth > 1.001 * f.threat.radius].any()
    assert 0 < int(broken.sum()) < 24
    assert f.threat.inside(f.x, outcome.x_adv).all()
    assert (outcome.forwards[broken] < f.attack.passes()[0]).all()


@pytest.mark.parametrize(("classes", "targets"), [(2, 1), (3, 2), (10, 9), (12, 9)])
def test_costs_two_forwards_and_one_backward_an_iteration(fight, models, classes, targets):
    f = fight("fab_t", models.curved((1, 6, 6), classes), shape=(1, 6, 6), eps="1/100000", steps=5, n=9, batch_size=8)
    outcome = f.run()
    assert not f.broken(outcome).any()
    assert f.attack.passes() == (10 * targets, 5 * targets)
    assert outcome.forwards.tolist() == [10 * targets] * 9
    assert outcome.backwards.tolist() == [5 * targets] * 9


def test_standard_cost(fight, models):
    assert fight("fab_t", models.curved((1, 3, 3), 10), shape=(1, 3, 3)).attack.passes() == (1800, 900)


def test_restarts_begin_elsewhere_and_cost_a_run_each(fight, models):
    f = fight("fab_t", models.curved((1, 6, 6), 3), shape=(1, 6, 6), eps="1/1000", steps=4, restarts=3)
    assert f.attack.passes() == (48, 24)
    outcome = f.run()
    held = ~f.broken(outcome)
    assert held.any()
    assert (outcome.forwards[held] == 48).all()
    state = {**f.attack.start(f.index, f.x, f.y, f.target.clean(f.x)), "x": f.x, "y": f.y, "index": f.index}
    again = f.attack._begin(state, torch.ones_like(f.y))
    assert (again != f.x).flatten(1).any(1).all()
    assert torch.equal(f.attack._begin(state, torch.full_like(f.y, 3)), f.x)
    assert torch.allclose(f.threat.distance(f.x, again), torch.tensor(0.0005, dtype=torch.float64), rtol=0.02)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 70), st.integers(1, 40))
def test_sorting_keeps_equal_values_in_their_order(seed, d, levels):
    values = torch.randint(0, levels, (5, d), generator=torch.Generator().manual_seed(seed)) / levels
    values[:, :: d // 3 + 1] = torch.inf
    found, expected = ascending(values), values.sort(dim=1, stable=True)
    assert torch.equal(found[0], expected.values)
    assert torch.equal(found[1], expected.indices)
