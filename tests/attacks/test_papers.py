"""The papers' own attacks: their maths, the gate over a batch, and that what ends is what is handed over."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from arena.attack import Unsupported
from arena.plugins import registry
from arena.rng import Stream
from arena.specs import complete, load
from arena.surface import Surface
from arena.target import Target
from arena.threat import Threat

LINF = Threat.parse("Linf", "0.1")


def attack(name, target, x, y, threat=LINF, seed=0, **options):
    spec = registry().get("attack", name).spec
    torch.manual_seed(seed)
    return load(spec.run)(target, x, y, threat, None, Stream.of(0, name), **complete(name, spec.options, options))


def steep(x):
    """Class 0 hangs on the first pixel, steeply; class 2 on the second; class 1 is what remains."""
    a, b = x[:, 0, 0, 0], x[:, 0, 0, 1]
    return torch.stack((100 * (a - 0.5), torch.zeros_like(a), b - 0.5), 1)


class Wrapped(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.fixture
def planted():
    """Two naturally correct points: one falls at the first step, far; the other needs three."""
    x = torch.zeros(2, 1, 4, 4)
    x[0, 0, 0, 0], x[1, 0, 0, 1] = 0.52, 0.55
    y = torch.tensor([0, 2])
    target = Target(Wrapped(steep), Surface(), 3)
    assert torch.equal(target.logits(x).argmax(1), y)
    return target, x, y


def test_the_batch_gate_stops_every_point_once_the_sum_is_gone(planted):
    target, x, y = planted
    usual = {"step": 0.25, "start": "none"}
    gated = attack("paper_cw", target, x, y, steps=20, **usual)
    assert torch.equal(gated, attack("paper_cw", target, x, y, steps=1, **usual))  # a gradient of exact zeros from then
    leaf = gated.clone().requires_grad_()
    lead = target.read(leaf).logits
    lead = lead.gather(1, y[:, None]).squeeze(1) - lead.scatter(1, y[:, None], -torch.inf).amax(1)
    assert lead.sum() <= 0
    assert (target.logits(gated).argmax(1) == y).tolist() == [False, True]  # the second is spared


def test_each_points_own_hinge_breaks_what_the_batch_gate_spares(planted):
    target, x, y = planted
    clamped = attack("paper_cw", target, x, y, steps=20, step=0.25, start="none", gate="clamp")
    assert (target.logits(clamped).argmax(1) != y).all()
    alone = attack("paper_cw", target, x[1:], y[1:], steps=20, step=0.25, start="none")  # a batch of its own
    assert (target.logits(alone).argmax(1) != y[1:]).all()


def test_confidence_is_where_the_clamp_stops(planted):
    target, x, y = planted
    near = attack("paper_cw", target, x, y, steps=20, step=0.05, start="none", gate="clamp", confidence=0.01)
    lead = target.logits(near)[1]
    assert -0.0151 < float(lead[2] - lead[1]) <= -0.0099  # one step of 0.005 beyond it at most, though 20 were taken


def test_one_full_step_is_fgsm_of_the_weighed_loss(models):
    model, surface = models.curved((1, 8, 8), 5), models.headed
    target = Target(model, surface, 5)
    x = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    y = target.logits(x).argmax(1)
    for lam, weights in ((0.0, (1, 0)), (2.0, (1, 2)), (float("inf"), (0, 1))):
        leaf = x.clone().requires_grad_()
        reading = target.read(leaf)
        loss = weights[0] * F.cross_entropy(reading.logits, y, reduction="sum")
        loss = loss + weights[1] * F.cross_entropy(reading.heads["early"], y, reduction="sum")
        (grad,) = torch.autograd.grad(loss, leaf)
        made = attack("paper_pgd", target, x, y, steps=1, step=1, start="none", lam=lam)
        assert torch.equal(made, LINF.project(x, x + 0.1 * grad.sign()))
    both = [attack("paper_pgd", target, x, y, steps=1, step=1, start="none", lam=v) for v in (0, float("inf"))]
    assert not torch.equal(*both)  # heads and logits climb different ways


def test_averaging_over_no_distance_is_plain_and_over_some_is_not(models):
    target = Target(models.curved((1, 8, 8), 5), Surface(), 5)
    x = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    y = target.logits(x).argmax(1)
    usual = {"steps": 5, "step": 0.25, "start": "none"}
    plain = attack("paper_pgd", target, x, y, **usual)
    near = attack("paper_avg_pgd", target, x, y, m=2, near=1e-6, **usual)
    far = attack("paper_avg_pgd", target, x, y, m=2, near=1, **usual)
    assert (near == plain).float().mean() > 0.98  # rounding may turn the sign of a tiny gradient
    assert not torch.equal(far, plain)
    target.meter.backwards = 0
    attack("paper_avg_pgd", target, x, y, m=3, **usual)
    assert target.meter.backwards == 8 * 5 * 3


@given(
    name=st.sampled_from(("paper_pgd", "paper_cw", "paper_avg_pgd")),
    start=st.sampled_from(("uniform", "none")),
    step=st.sampled_from((0.1, 1.0, 5.0)),
    eps=st.sampled_from(("0.3", "8/255", "1/3")),
)
def test_what_is_handed_over_is_in_ball_and_box(name, start, step, eps):
    target = Target(Wrapped(steep), Surface(), 3)
    x = torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(2)).round(decimals=1)
    threat = Threat.parse("Linf", eps)
    made = attack(name, target, x, torch.arange(5) % 3, threat, steps=2, step=step, start=start)
    assert threat.inside(x, made).all()
    assert ((made >= 0) & (made <= 1)).all()


def test_a_weight_without_heads_is_refused_by_name(planted):
    with pytest.raises(Unsupported, match=r"lam=2 weighs heads; the surface declares none"):
        attack("paper_pgd", *planted, lam=2)


def test_reading_heads_counts_once_and_climbs_all(models):
    target = Target(models.curved((1, 8, 8), 5), models.headed, 5)
    x = torch.rand(3, 1, 8, 8)
    target.module.expect(x)
    leaf = x.clone().requires_grad_()
    reading = target.read(leaf)
    assert torch.equal(reading.logits, target.module(x))
    assert not target.module.moved
    (grad,) = torch.autograd.grad(reading.logits.sum() + reading.heads["early"].sum(), leaf)
    assert (grad != 0).any()
    assert (target.meter.forwards, target.meter.backwards) == (6, 3)
    target.read(x + 0.01)
    assert target.module.moved
