"""Random models: a point leaves when it is surely broken, not at a lucky draw."""

import pytest
import torch
from torch import nn

from arena.surface import Knob, Surface


class Doubtful(nn.Module):
    """Wrong (class 1) with the chance of the image's brightness, whose slope the second logit shows."""

    def __init__(self) -> None:
        super().__init__()
        self.sober = False

    def forward(self, x):
        bright = x.flatten(1).mean(1)
        hit = (torch.rand(len(x)) < bright).to(x.dtype)
        score = bright if self.sober else hit + bright - bright.detach()
        return torch.stack((torch.full_like(score, 0.5), score), 1)


SURFACE = Surface(knobs={"sober": Knob("", "sober", "constant", (True,))}, random=True)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("pgd", {"restarts": 2}),
        ("pgd", {"eot": 3}),
        ("pgd", {"eot": 30}),
        ("apgd_ce", {"steps": 40}),
        ("knob", {"knob": "sober", "steps": 40}),
    ],
)
def test_a_lucky_draw_lets_no_point_go(fight, name, options):
    torch.manual_seed(0)
    faint = fight(name, Doubtful(), shape=(1, 3, 3), eps="0.03", low=0.4, high=0.44, n=40, surface=SURFACE, **options)
    faint.y[:] = 0
    outcome = faint.run(draws=20)  # at most 0.47 can be reached
    assert (outcome.forwards == outcome.most).all()
    bright = fight(name, Doubtful(), shape=(1, 3, 3), eps="0.6", low=0.4, high=0.44, n=40, surface=SURFACE, **options)
    bright.y[:] = 0
    outcome = bright.run(draws=20)
    assert (outcome.forwards < outcome.most).all()
    assert (outcome.x_adv.flatten(1).mean(1) > 0.6).all()
