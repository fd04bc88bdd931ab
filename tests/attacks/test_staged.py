"""The staged attack: what it spends follows what may fall, and it finds what is planted there."""

from __future__ import annotations

import math

import pytest
import torch
from arena_attacks.staged import staged
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from arena.attack import Setup
from arena.engine import run_iterated
from arena.rng import Stream
from arena.surface import Surface
from arena.target import Target
from arena.threat import Threat

LINF = Threat.parse("Linf", "0.1")


class Slopes(nn.Module):
    """Logits 0 for class 0 and a_k * (mean over one pixel row each) - b_k for the others: gaps and slopes by hand."""

    def __init__(self, slopes, gaps, scale=1.0):
        super().__init__()
        self.slopes, self.gaps, self.scale = torch.tensor(slopes), torch.tensor(gaps), scale

    def forward(self, x):
        rows = x[:, 0, : len(self.slopes)].mean(-1) - 0.5
        return torch.cat((torch.zeros(len(x), 1), rows * self.slopes - self.gaps), 1) * self.scale


def played(attack, model, classes, n=8, threat=LINF):
    x = torch.full((n, 1, 8, 8), 0.5)
    target = Target(model, Surface(), classes, 64, "cpu")
    setup = Setup(threat, classes, Surface(), (1, 8, 8), Stream.of(0, "staged"), lambda name: None)
    made = attack(setup)
    outcome = run_iterated(made, target, x, torch.zeros(n, dtype=torch.int64), torch.arange(n))
    assert not outcome.error, outcome.trace
    return made, outcome, target.logits(outcome.x_adv).argmax(1)


def sloped(attack, slopes, gaps, n=8, **more):
    return played(attack, Slopes(slopes, gaps, **more), len(slopes) + 1, n)


@pytest.mark.parametrize(
    ("lacks", "steps", "proposals"), [(50.0, 3, 0), (1.9, 3, 0), (1.5, 4, 0), (0.9, 5, 0), (0.5, 6, 0), (0.4, 6, 2)]
)
def test_a_point_leaves_the_look_where_the_steps_to_come_cannot_make_up_what_it_lacks(lacks, steps, proposals):
    # the first step wins all there is, 0.1 * the slope; what is left to a mistake is so many times that
    _, outcome, predicted = sloped(lambda s: staged(s, lanes=4, look=5, glance=2), [1.0] * 5, [0.1 * (1 + lacks)] * 5)
    assert (predicted == 0).all()
    assert outcome.forwards.tolist() == [4 * (steps + proposals)] * 8
    assert outcome.backwards.tolist() == [4 * steps] * 8
    assert bool(outcome.attempted.all())


def test_a_class_that_the_first_look_leaves_out_falls_in_a_round():
    # four flat classes lie nearer; the fifth falls to a climb that aims at it, and to no other
    slopes, gaps = [1.0, 1.0, 1.0, 1.0, 60.0], [2.0, 2.1, 2.2, 2.3, 5.9]
    _, outcome, predicted = sloped(lambda s: staged(s, lanes=4, look=5, hope=math.inf), slopes, gaps)
    assert (predicted == 5).all()
    assert (outcome.forwards > 4 * (6 + 3)).all()


class Dents(nn.Module):
    """Class 1 wins where seven of eight pixels of a row are at the ball's upper corner; each counts there alone."""

    def forward(self, x):
        there = (x[:, 0, 0] > 0.599).float().sum(1)
        flat = torch.zeros_like(there)
        return torch.stack((flat + 6.5 + 0 * x.sum((1, 2, 3)), there, flat - 9, flat - 9), 1)


def test_random_search_from_the_best_point_finds_what_no_gradient_shows():
    made, outcome, predicted = played(lambda s: staged(s, steps=2, rounds=30, hope=math.inf, fade=1), Dents(), 4)
    assert (predicted == 1).all()
    assert (outcome.forwards < made.passes()[0]).all()
    _, _, short = played(lambda s: staged(s, steps=2, rounds=1, glance=1, search=1, hope=math.inf), Dents(), 4)
    assert (short == 0).all()  # the climbs alone find nothing


def test_all_the_hope_costs_the_bound():
    made, outcome, predicted = sloped(
        lambda s: staged(s, lanes=3, look=5, glance=4, steps=6, search=7, rounds=2, hope=math.inf),
        [1.0] * 5,
        [5.0] * 5,
    )
    assert (predicted == 0).all()
    assert made.passes() == (3 * (6 + 4 + 2 * (7 + 7)), 3 * (6 + 2 * 7))
    assert outcome.forwards.tolist() == [made.passes()[0]] * 8
    assert outcome.backwards.tolist() == [made.passes()[1]] * 8


def test_climbs_of_a_row_aim_at_all_classes_in_turn_and_the_first_at_the_nearest():
    # the fifth class is the farthest at the image and the nearest where a climb has aimed at it
    aims = []

    def spied(setup):
        made = staged(setup, lanes=2, look=2, glance=1, steps=2, search=1, rounds=4, hope=math.inf)
        ask = made.ask
        made.ask = lambda state: aims.append((state["round"], ask(state).targets, state["left"])) or ask(state)
        return made

    sloped(spied, [0.1, 0.1, 0.1, 0.1, 9.0], [2.0, 2.1, 2.2, 2.3, 2.6], n=1)
    climbs = [(int(r[0]), t[0].tolist()) for r, t, left in aims if not left[0]]
    assert dict(climbs) == {0: [1, 2], 1: [1, 3], 2: [1, 4], 3: [1, 5], 4: [5, 1]}


def test_the_scale_of_the_logits_plays_no_part():
    slopes, gaps = [3.0, 5.0, 8.0, 13.0], [0.5, 0.7, 1.0, 1.5]
    _, plain, _ = sloped(lambda s: staged(s, hope=2), slopes, gaps)
    _, scaled, _ = sloped(lambda s: staged(s, hope=2), slopes, gaps, scale=1024.0)
    assert torch.equal(plain.x_adv, scaled.x_adv)
    assert torch.equal(plain.forwards, scaled.forwards)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.floats(0.5, 80), min_size=4, max_size=6),
    st.lists(st.floats(0.5, 6), min_size=6, max_size=6),
    st.integers(1, 8),
    st.floats(0, 5),
    st.sampled_from(["Linf", "L2"]),
)
def test_it_stays_in_the_ball_and_more_hope_costs_no_less(slopes, gaps, look, hope, norm):
    threat = Threat.parse(norm, {"Linf": "0.1", "L2": "0.3"}[norm])
    spent = []
    for much in (hope, 2 * hope + 1):
        model = Slopes(slopes, gaps[: len(slopes)])
        made, outcome, predicted = played(
            lambda s, much=much: staged(s, look=look, steps=6, search=5, rounds=3, hope=much, fade=1),
            model,
            len(slopes) + 1,
            threat=threat,
        )
        assert (outcome.forwards <= made.passes()[0]).all()
        assert threat.inside(torch.full_like(outcome.x_adv, 0.5), outcome.x_adv).all()
        spent.append((outcome.forwards, predicted != 0))
    (some, fell), (more, fell_too) = spent
    assert (more >= some).all()
    assert (fell_too | ~fell).all()


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("lanes", [1, 2, 3, 5])
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_proposals_of_any_number_of_lanes_and_channels_change_one_square_each(channels, lanes, norm):
    threat, shape = Threat.parse(norm, "0.1"), (channels, 6, 8)
    setup = Setup(threat, 10, Surface(), shape, Stream.of(0, "staged"), lambda name: None)
    made = staged(setup, lanes=lanes)
    x = torch.rand(4, *shape, generator=torch.Generator().manual_seed(0))
    index = torch.arange(4)
    state = {"x": x, "best": x, "index": index, "tried": torch.ones_like(index)}
    points = made._propose(state)["point"]
    assert points.shape == (4, lanes, *shape)
    moved = (points - x.unsqueeze(1)).abs()
    assert bool((moved.flatten(2).amax(2) > 0).all())
    if norm == "Linf":  # one sign a channel, and a square of equal sides
        changed = (moved > 0).any(2)
        down, along = changed.any(3).sum(2), changed.any(2).sum(2)
        assert torch.equal(changed.sum((2, 3)), down * along)
        assert bool((down == along).all())
