import math

import pytest
import torch
import torch.nn.functional as F
from arena_attacks.apgd import checkpoints
from arena_attacks.steps import ranked, surface_start

from arena.surface import Head, Surface


def test_checkpoints_are_those_of_the_standard_attack():
    assert [at for at, _ in checkpoints(100)] == [22, 41, 57, 70, 80, 87, 93, 99]
    assert [window for _, window in checkpoints(100)] == [22, 19, 16, 13, 10, 7, 6, 6]


@pytest.mark.parametrize("steps", [1, 2, 5, 30, 1000])
def test_checkpoints_of_any_length_stay_in_the_run(steps):
    found = checkpoints(steps)
    assert found
    assert all(1 <= at <= steps for at, _ in found)


def plainly(fight, row, steps=100, rho=0.75):
    """Algorithm 1 of the paper for one row, written as it stands there, on the cross-entropy."""
    x, y, threat = fight.x[row : row + 1], fight.y[row : row + 1], fight.threat
    model = fight.target.model

    def look(p):
        p = p.clone().requires_grad_()
        value = F.cross_entropy(model(p.expand(8, *p.shape[1:])), y.expand(8), reduction="none")[0]
        return value.item(), torch.autograd.grad(value, p)[0]

    def direction(g):
        return g.sign() if threat.norm == "Linf" else g / g.norm()

    size, marks, since = 2 * threat.radius, [0], 22
    while marks[-1] + since <= steps:
        marks.append(marks[-1] + since)
        since = max(since - 3, 6)
    points = [surface_start(fight.attack.setup, fight.index[row : row + 1], 0, x)]
    first, grad = look(points[0])
    values, peaks, sizes = [first], [first], [size]
    best, best_grad, here = points[0], grad, points[0]
    before = here
    for k in range(steps):
        ahead = threat.project(x, here + size * direction(grad))
        if k > 0:
            ahead = threat.project(x, here + 0.75 * (ahead - here) + 0.25 * (here - before))
        before, here = here, ahead
        value, grad = look(here)
        if value > peaks[-1]:
            best, best_grad = here, grad
        values.append(value)
        peaks.append(max(peaks[-1], value))
        if k + 1 in marks:
            j = marks.index(k + 1)
            window = range(marks[j - 1], marks[j])
            rises = sum(values[i + 1] > values[i] for i in window)
            few = rises <= rho * len(window)
            stuck = sizes[j - 1] == size and peaks[marks[j - 1]] == peaks[marks[j]] if j > 1 else peaks[0] == peaks[-1]
            if few or stuck:
                size, here, grad = size / 2, best, best_grad
        if k + 1 in marks:
            sizes.append(size)
    return peaks, sizes


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_equals_the_algorithm_written_row_by_row(fight, models, norm):
    eps = {"Linf": "0.004", "L2": "0.02"}[norm]
    f = fight("apgd_ce", models.curved((1, 6, 5), 4), shape=(1, 6, 5), norm=norm, eps=eps, n=6)
    state = {**f.attack.start(f.index, f.x, f.y, f.target.clean(f.x)), "x": f.x, "y": f.y, "index": f.index}
    sizes = []
    for _ in range(101):
        if int(state["step"][0]) - 1 in (22, 41):
            sizes.append(state["size"])
        owned = {k: state[k] for k in ("x", "y", "index")}
        state = {**f.attack.tell(state, f.target.answer(f.attack.ask(state), f.y)), **owned}
        assert not state["done"].all() or int(state["step"][0]) == 101
    compared = 0
    for row in range(6):
        if f.target.logits(state["best"])[row].argmax() != f.y[row]:
            continue
        peaks, expected = plainly(f, row)
        assert state["top"][row].item() == pytest.approx(peaks[-1], rel=1e-5)
        # later on the loss is flat up to rounding, and whether it rises is an accident of the last bits
        assert [s[row].item() for s in sizes] == pytest.approx(expected[1:3])
        compared += 1
    assert compared >= 3


@pytest.mark.parametrize("name", ["apgd_ce", "apgd_dlr", "apgd_t"])
@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("classes", [2, 3, 4, 10])
def test_breaks_every_point_of_a_linear_model_that_can_be_broken(fight, models, worst_case, name, norm, classes):
    kinds = set()
    for eps in {"Linf": ("0.01", "0.05", "0.1"), "L2": ("0.05", "0.1", "0.4")}[norm]:
        f = fight(name, models.linear((1, 8, 8), classes, seed=0), n=24, norm=norm, eps=eps, low=0.45, high=0.55)
        outcome, exact = f.run(), worst_case(f)
        broken = f.broken(outcome)
        clean = f.margins(type(outcome).empty(f.x))
        assert broken[exact > 0.02 * (exact - clean)].all()
        assert not broken[exact < -1e-5].any()
        kinds |= set(broken.tolist())
    assert kinds == {True, False}


@pytest.mark.parametrize(("name", "classes"), [("apgd_ce", 2), ("apgd_ce", 10), ("apgd_dlr", 2), ("apgd_t", 2)])
@pytest.mark.parametrize(("norm", "eps"), [("Linf", "0.004"), ("L2", "0.03")])
def test_reaches_the_worst_margin_of_a_linear_model(fight, models, worst_case, name, classes, norm, eps):
    # only where the loss is a rising function of the margin; the ratios of 3 and more classes peak elsewhere
    f = fight(name, models.linear((1, 8, 8), classes), norm=norm, eps=eps, low=0.2, high=0.8)
    outcome = f.run()
    clean, exact = f.margins(type(outcome).empty(f.x)), worst_case(f)
    held = ~f.broken(outcome)
    assert held.any()
    assert ((f.margins(outcome) - clean) >= 0.95 * (exact - clean))[held].all()


def test_targets_are_ranked_by_the_clean_scores_and_never_the_true_class():
    scores = torch.tensor([[3.0, 9.0, 1.0, 5.0], [9.0, 8.0, 7.0, 6.0]])
    assert ranked(scores, torch.tensor([1, 3]), 9).tolist() == [[3, 0, 2, 1], [0, 1, 2, 3]]
    assert ranked(scores, torch.tensor([1, 3]), 3).tolist() == [[3, 0, 2], [0, 1, 2]]


@pytest.mark.parametrize(("classes", "runs"), [(2, 1), (3, 2), (4, 3), (10, 9), (12, 9)])
def test_targets_are_capped_and_each_costs_a_run(fight, models, classes, runs):
    f = fight("apgd_t", models.curved((1, 6, 6), classes), shape=(1, 6, 6), eps="1/100000", steps=7, n=9)
    outcome = f.run()
    assert not f.broken(outcome).any()
    assert f.attack.passes() == (8 * runs, 8 * runs)
    assert outcome.forwards.tolist() == outcome.backwards.tolist() == [8 * runs] * 9


def test_standard_settings_cost_101_pairs_and_909(fight, models):
    model = models.curved((1, 3, 3), 10)
    assert fight("apgd_ce", model, shape=(1, 3, 3)).attack.passes() == (101, 101)
    assert fight("apgd_t", model, shape=(1, 3, 3)).attack.passes() == (909, 909)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_starts_on_the_surface(fight, models, norm):
    f = fight("apgd_ce", models.curved((3, 5, 4), 4), shape=(3, 5, 4), norm=norm, eps="0.3", low=0.4, high=0.6)
    point = f.attack.start(f.index, f.x, f.y, f.target.clean(f.x))["point"]
    assert torch.allclose(f.threat.distance(f.x, point), torch.tensor(0.3, dtype=torch.float64), rtol=1e-5)


class Deaf(torch.nn.Module):
    """A head that is easily flipped, and an output that hardly listens."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head, self.rest = torch.nn.Linear(12, 3), torch.nn.Linear(12, 3)

    def forward(self, x):
        x = x.flatten(1) - 0.5
        self.head(x)
        return torch.tensor([1.0, 0.0, 0.0]) + 1e-3 * self.rest(x)


def test_a_head_is_attacked_as_the_classifier_but_only_the_output_counts(fight):
    surface = Surface(heads={"head": Head("head")})
    f = fight("apgd_ce", Deaf(), shape=(1, 3, 4), surface=surface, head="head", eps="0.4", n=24)
    outcome = f.run()
    assert not f.broken(outcome).any()
    head = f.target.clean(outcome.x_adv)[:, 1]
    assert (head.argmax(1) != f.y).all()
    assert (outcome.forwards == 101).all()


def test_head_targets_come_from_the_heads_scores(fight, models):
    f = fight("apgd_t", models.curved((1, 8, 8), 4), surface=models.headed, head="early")
    clean = f.target.clean(f.x)
    state = f.attack.start(f.index, f.x, f.y, clean)
    assert torch.equal(state["targets"], ranked(clean[:, 1], f.y, 3))
    assert not torch.equal(state["targets"], ranked(clean[:, 0], f.y, 3))
    assert math.isinf(state["top"][0])
