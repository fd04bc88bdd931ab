"""The referee: planted breaks are found, planted cheats are not believed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from arena.referee import BATCH, Referee
from arena.threat import Threat


def threshold(bound: float = 0.5) -> nn.Module:
    """Class 1 where the mean is above the bound."""

    class Mean(nn.Module):
        def forward(self, x):
            lead = x.flatten(1).mean(1) - bound
            return torch.stack((-lead, lead), 1)

    return Mean()


X = torch.full((4, 1, 2, 2), 0.45)
Y = torch.zeros(4, dtype=torch.int64)
INDEX = torch.arange(4)


def test_a_planted_break_inside_the_ball_counts():
    word = Referee(threshold(), Threat.parse("Linf", "0.1")).judge(X, X + 0.09, Y, INDEX)
    assert word.broken.all()
    assert word.violations == {}
    assert (word.margin < 0).all()


def test_the_same_break_outside_the_ball_does_not():
    word = Referee(threshold(), Threat.parse("Linf", "0.08")).judge(X, X + 0.09, Y, INDEX)
    assert not word.broken.any()
    assert word.violations == {"ball": 4}


@pytest.mark.parametrize(
    ("x_adv", "kind"),
    [
        (torch.full_like(X, float("nan")), "nan"),
        (torch.full_like(X, float("inf")), "nan"),
        (torch.full_like(X, 1.0 + 1e-7), "box"),
        (torch.full_like(X, -1e-7), "box"),
        (torch.full_like(X, 0.56), "ball"),
    ],
)
def test_violations_are_counted_by_kind(x_adv, kind):
    word = Referee(threshold(), Threat.parse("Linf", "0.1")).judge(X, x_adv, Y, INDEX)
    assert word.violations == {kind: 4}
    assert not word.broken.any()
    assert not word.valid.any()


def test_one_bad_row_does_not_spoil_the_others():
    x_adv = X + 0.09
    x_adv[2] = float("nan")
    word = Referee(threshold(), Threat.parse("Linf", "0.1")).judge(X, x_adv, Y, INDEX)
    assert word.broken.tolist() == [True, True, False, True]
    assert word.violations == {"nan": 1}


def test_logits_that_are_not_finite_are_no_right_answer():
    class Nan(nn.Module):
        def forward(self, x):
            return torch.full((len(x), 2), float("nan"))

    word = Referee(Nan(), Threat.parse("Linf", "0.1")).judge(X, X + 0.05, Y, INDEX)
    assert word.broken.all()
    assert word.nonfinite == 4
    assert word.violations == {}


def test_a_point_is_never_modified():
    x_adv = X + 0.3
    before = x_adv.clone()
    Referee(threshold(), Threat.parse("Linf", "0.1")).judge(X, x_adv, Y, INDEX)
    assert torch.equal(x_adv, before)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 2 * BATCH + 3))
def test_scores_do_not_depend_on_how_many_are_scored(n):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
    x = torch.rand(2 * BATCH + 3, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    y = torch.zeros(len(x), dtype=torch.int64)
    referee = Referee(model, Threat.parse("Linf", "0.1"))
    assert torch.equal(referee.score(x, y, y).margin[:n], referee.score(x[:n], y[:n], y[:n]).margin)


class Coin(nn.Module):
    """Says class 1 with a probability that is the image's mean."""

    def forward(self, x):
        heads = torch.rand(len(x)) < x.flatten(1).mean(1)
        return torch.stack(((~heads).float(), heads.float()), 1)


def test_a_random_model_is_judged_by_the_majority_of_its_draws():
    x = torch.cat((torch.full((50, 1, 2, 2), 0.1), torch.full((50, 1, 2, 2), 0.9)))
    referee = Referee(Coin(), Threat.parse("Linf", "1"), random=True)
    y, index = torch.zeros(100, dtype=torch.int64), torch.arange(100)
    scores = referee.score(x, y, index)
    assert scores.predicted[:50].eq(0).all()
    assert scores.predicted[50:].eq(1).all()
    assert 0.8 < float(scores.agreement.mean()) < 0.97
    some = torch.tensor([70, 3, 55])  # alone, elsewhere in the batch: the same draws, the same word
    again = referee.score(x[some], y[some], index[some])
    assert torch.equal(again.agreement, scores.agreement[some])
    assert not referee.judge(x, x, scores.predicted, index).broken.any()


def test_margins_within_rounding_are_borderline():
    near = torch.full((4, 1, 2, 2), 0.5 - 1e-6)

    class Scaled(nn.Module):
        def forward(self, x):
            lead = x.flatten(1).mean(1) - 0.5
            return torch.stack((-lead, lead, torch.full_like(lead, -1.0)), 1)

    word = Referee(Scaled(), Threat.parse("Linf", "0.1")).judge(X, near, Y, INDEX)
    assert word.borderline == 4
    assert not word.broken.any()
