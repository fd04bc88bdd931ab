"""Gates that recognise large changes, and masks that follow two classes: only attacks made for them find the way."""

import pytest
import torch
from torch import nn

from arena.attack import Unsupported
from arena.plugins import registry
from arena.selection import Select
from arena.specs import expand
from arena.surface import Gate, Head, Selection, Surface
from arena.threat import Threat


def images(x, quadrant):
    """Mean of one quadrant of (N, 1, 4, 4), (N,)."""
    i, j = divmod(quadrant, 2)
    return x[:, 0, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((1, 2))


def breakers(fight, model, surface, classes, **where):
    """Return the specs of the roster ``adaptive`` that break all images, and those that break any."""
    every, some = [], []
    for name, options in expand(
        registry().get("roster", "adaptive").spec, surface, Threat.parse("Linf", "0.2"), classes
    ):
        f = fight(name, model, shape=(1, 4, 4), eps="0.2", surface=surface, n=6, **where, **options)
        assert (f.y == 0).all()
        broken = f.broken(f.run())
        every += [(name, options)] if broken.all() else []
        some += [(name, options)] if broken.any() else []
    return every, some


class Recogniser(nn.Module):
    """A gate that knows a changed image by its contrast, before a branch that falls at a quarter of eps.

    Away from clean images the gate is exactly 0 and has no slope.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Sigmoid()

    def forward(self, x):
        w = self.gate(1e4 * (0.05 - (x - 0.5).abs().mean((1, 2, 3))))
        margin = w * 20 * (images(x, 1) - 0.53) + (1 - w) * (-2 - (images(x, 1) - 0.5))
        return torch.stack((torch.zeros_like(margin), margin), 1)


RECOGNISED = Surface(gates={"clean": Gate("gate")})
NEARLY_CLEAN = {"low": 0.49, "high": 0.51}


def test_of_the_roster_only_small_changes_get_past_a_gate_that_recognises_large_ones(fight):
    every, some = breakers(fight, Recogniser(), RECOGNISED, 2, **NEARLY_CLEAN)
    assert [o["shrink"] for _, o in every] == [0.25, 0.5, 1.0]
    assert all(name == "gate_held" and "start" in o for name, o in some)


@pytest.mark.parametrize("name", ["gate_held", "gate_pgd"])
@pytest.mark.parametrize("how", [{"start": "image"}, {"start": "fgsm"}, {"shrink": 0.25}])
def test_each_near_start_and_each_small_ball_finds_it(fight, name, how):
    where = {"shape": (1, 4, 4), "eps": "0.2", "surface": RECOGNISED, "n": 6, **NEARLY_CLEAN}
    f = fight(name, Recogniser(), **where)
    assert not f.broken(f.run()).any()
    f = fight(name, Recogniser(), **where, **how)
    outcome = f.run()
    assert f.broken(outcome).all()
    radius = 0.2 * how.get("shrink", 1)
    assert ((outcome.x_adv - f.x).abs() <= radius + 1e-6).all()


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_a_rounded_start_is_on_a_grid_inside_the_ball_and_moves_with_the_restart(fight, norm):
    f = fight("gate_held", Recogniser(), shape=(1, 4, 4), norm=norm, eps="0.2", surface=RECOGNISED, start="rounded")
    starts = [f.attack._begin(f.index, k, f.x) for k in range(2)]
    assert not torch.equal(*starts)
    for start in starts:
        assert f.threat.inside(f.x, start).all()
        inside = (start > 0) & (start < 1)
        assert max(len(row[keep].mul(1e4).round().unique()) for row, keep in zip(start, inside, strict=True)) < 16


class ByTwo(nn.Module):
    """The output follows the second choice alone: 1 once class 2 is chosen, and a mixture points away from it.

    Class 0 leads by more than eps can move, so the first choice is always its; class 1 is second by a lead that falls
    only where class 2 rises and class 1 sinks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Identity()
        self.first, self.second = Select(), Select()

    def forward(self, x):
        lead = torch.tensor([0.85, 0.3, 0.0, 0.0])
        scores = self.scores(20 * (torch.stack([images(x, k) for k in range(4)], 1) + lead))
        top = nn.functional.one_hot(scores.argmax(1), 4).bool()
        chosen = self.first(scores, torch.eye(4)) + self.second(scores.masked_fill(top, -torch.inf), torch.eye(4))
        margin = -1 - 2 * chosen[:, 2] + 60 * (chosen[:, 2] - 0.9).relu()
        rest = torch.full_like(margin, -5.0)
        return torch.stack((torch.zeros_like(margin), margin, rest, rest), 1)


TWO = Surface(
    heads={"scores": Head("scores")},
    selections={
        "first": Selection("first", scores="scores"),
        "second": Selection("second", scores="scores", rank=2),
    },
)


def test_of_the_roster_only_steering_both_choices_flips_what_follows_the_second(fight):
    every, some = breakers(fight, ByTwo(), TWO, 4, low=0.47, high=0.53)
    assert [o["place"] for _, o in every] == ["behind"]
    assert {name for name, o in some} == {"forced"}
    assert all("place" in o for _, o in some)


def test_pairs_need_a_second_rank_and_a_third_class(fight, models):
    with pytest.raises(Unsupported, match=r"forced\(place=behind\) needs a selection of rank 2 scored by a head"):
        fight("forced", models.rich((1, 4, 4), 3), shape=(1, 4, 4), surface=Surface(
            heads=models.full.heads, selections={"mask": models.full.selections["mask"]}), place="behind")  # fmt: skip
    for place in ("first", "second"):
        with pytest.raises(Unsupported, match=rf"forced\(place={place}\) needs two wrong classes"):
            fight("forced", models.rich((1, 4, 4), 2), shape=(1, 4, 4), surface=models.full, place=place)
