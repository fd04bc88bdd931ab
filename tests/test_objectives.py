"""Objectives against numbers worked out by hand, and laws they must keep."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arena import objectives
from arena.errors import ArenaError
from arena.objectives import BUILT_IN, objective

FIVE = [3.0, 1.0, 2.0, -1.0, 0.0]


def aim(name, target, y):
    """Return the target as the objective takes it: for a pair, before the true class."""
    return torch.stack((target, y), 1) if name == "top_two" else target


def run(name, scores, y, target=None):
    t = None if target is None else torch.tensor([target])
    return objective(name)(torch.tensor([scores]), torch.tensor([y]), t).item()


@pytest.mark.parametrize(
    ("name", "scores", "y", "target", "expected"),
    [
        ("ce", [0.0, 0.0], 0, None, math.log(2)),
        ("ce", [2.0, 0.0, 0.0], 0, None, math.log(1 + 2 * math.exp(-2))),
        ("ce_targeted", [2.0, 0.0, 0.0], 0, 1, -math.log(2 + math.exp(2))),
        ("margin", FIVE, 0, None, -1.0),  # right: next best is 2
        ("margin", FIVE, 2, None, 1.0),  # wrong by 1
        ("margin", [5.0, 1.0], 0, None, -4.0),
        ("margin_targeted", FIVE, 0, 3, -4.0),
        ("ce_scaled", [1e-6, 0.0], 0, None, math.log(1 + math.exp(-10))),  # spread 10, whatever it was
        ("ce_scaled", [-1e6, 1e6], 0, None, 10 + math.log(1 + math.exp(-10))),
        ("lead", FIVE, 0, 2, -0.25),  # (2 - 3) / (3 - -1)
        ("lead", FIVE, 3, 0, 0.25),
        ("lead_enough", FIVE, 0, 2, -0.25),
        ("lead_enough", FIVE, 3, 0, 0.1),  # enough
        ("lead_away", FIVE, 0, None, -0.25),
        ("lead_away", FIVE, 2, None, 0.25),
        ("top_two", FIVE, 0, [0, 2], 0.2),  # (3 - 2) / 4 and (2 - 1) / 4, of which a tenth each is enough
        ("top_two", FIVE, 0, [2, 0], -0.15),  # (2 - 3) / 4 and (3 - 1) / 4
        ("top_two", FIVE, 0, [2, 4], -0.65),  # (2 - 0) / 4 and (0 - 3) / 4
        ("top_two", [5.0, 1.0], 0, [1, 0], -0.9),  # two classes: no others
        ("dlr", FIVE, 0, None, -0.5),  # (2 - 3) / (3 - 1)
        ("dlr", FIVE, 2, None, 0.5),  # (3 - 2) / (3 - 1)
        ("dlr", [5.0, 1.0], 0, None, -4.0),  # two classes: the margin
        ("dlr", [5.0, 1.0, 0.0], 0, None, -0.8),  # (1 - 5) / (5 - 0)
        ("dlr_targeted", FIVE, 0, 2, -0.4),  # (2 - 3) / (3 - (1 + 0) / 2)
        ("dlr_targeted", [5.0, 1.0, 0.0], 0, 1, -4.0),  # three classes: the targeted margin
        ("dlr_targeted", [5.0, 1.0], 0, 1, -4.0),
    ],
)
def test_by_hand(name, scores, y, target, expected):
    assert run(name, scores, y, target) == pytest.approx(expected, abs=1e-6)


@given(st.integers(0, 2**32), st.integers(2, 6), st.sampled_from(sorted(BUILT_IN)))
@settings(deadline=None)
def test_a_margin_above_zero_is_exactly_a_break_and_every_objective_is_a_row_of_its_own(seed, classes, name):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(5, classes, generator=generator)
    y = torch.randint(classes, (5,), generator=generator)
    target = (y + 1) % classes
    broken = scores.argmax(1) != y
    for signed in ("margin", "dlr"):
        assert torch.equal(objective(signed)(scores, y, None) > 0, broken)
    target = aim(name, target, y)
    whole = objective(name)(scores, y, target)
    assert whole.shape == (5,)
    rows = torch.cat([objective(name)(scores[i : i + 1], y[i : i + 1], target[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(whole, rows)


@given(st.integers(0, 2**32), st.floats(0.5, 20), st.floats(-50, 50), st.sampled_from(("dlr", "dlr_targeted")))
@settings(deadline=None)
def test_dlr_ignores_scale_and_shift_of_the_logits(seed, scale, shift, name):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(5, (4,), generator=generator)
    before = objective(name)(scores, y, (y + 2) % 5)
    after = objective(name)(scores * scale + shift, y, (y + 2) % 5)
    torch.testing.assert_close(before, after, rtol=1e-6, atol=1e-6)


def test_ascending_moves_towards_the_break():
    scores = torch.tensor([FIVE], requires_grad=True)
    for name in BUILT_IN:
        y = torch.tensor([0])
        value = objective(name)(scores, y, aim(name, torch.tensor([2]), y))
        (gradient,) = torch.autograd.grad(value.sum(), scores)
        assert gradient[0, 0] < 0, name  # lower the true class
        assert gradient[0, 2] > 0, name  # raise the rival


def test_equal_logits_stay_finite():
    scores, y = torch.zeros(1, 5, requires_grad=True), torch.tensor([1])
    for name in BUILT_IN:
        made = objective(name)(scores, y, aim(name, torch.tensor([0]), y))
        (gradient,) = torch.autograd.grad(made.sum(), scores)
        assert made.isfinite().all(), name
        assert gradient.isfinite().all(), name


def test_scores_are_not_changed_by_looking():
    scores = torch.tensor([FIVE])
    objectives.best_other(scores, torch.tensor([0]))
    assert scores.tolist() == [FIVE]


def test_targeted_needs_a_target():
    for name in ("ce_targeted", "margin_targeted", "dlr_targeted", "lead", "top_two"):
        with pytest.raises(ValueError, match="needs a target"):
            run(name, FIVE, 0)


def test_by_reference_and_unknown():
    assert objective("arena.objectives:ce") is objectives.ce
    with pytest.raises(ArenaError, match=r"^unknown objective 'marginn'; did you mean 'margin'\?$"):
        objective("marginn")
