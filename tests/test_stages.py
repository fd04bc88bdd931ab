"""Losses and inner objectives against numbers worked out by hand; where labels may and may not go."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from arena.inner import ascend, evaluating, start_point
from arena.selection import Select, training_step
from arena.specs import Preset
from arena.stages import Context, Usual, boosted_ce, divergence, mart, probability, trades
from arena.surface import Head, Reader, Reading, Surface
from arena.threat import Threat

LOG = math.log


def logits(*probabilities: list[float]) -> torch.Tensor:
    return torch.tensor(probabilities).log()


def test_divergence_by_hand():
    got = divergence(logits([0.5, 0.5]), logits([0.25, 0.75]))
    assert got.item() == pytest.approx(0.5 * LOG(0.5 / 0.25) + 0.5 * LOG(0.5 / 0.75))


def test_boosted_cross_entropy_by_hand():
    z = logits([0.2, 0.5, 0.3], [0.7, 0.2, 0.1])
    y = torch.tensor([0, 0])
    rows = [-LOG(0.2) - LOG(1.0001 - 0.5), -LOG(0.7) - LOG(1.0001 - 0.2)]
    assert boosted_ce(z, y).item() == pytest.approx(sum(rows) / 2, rel=1e-5)


def test_trades_by_hand():
    z, z_adv, y = logits([0.5, 0.5]), logits([0.25, 0.75]), torch.tensor([1])
    kl = 0.5 * LOG(2) + 0.5 * LOG(2 / 3)
    assert trades(z, z_adv, y, beta=6.0).item() == pytest.approx(-LOG(0.5) + 6 * kl, rel=1e-5)


def test_mart_by_hand():
    z, z_adv, y = logits([0.2, 0.8]), logits([0.25, 0.75]), torch.tensor([1])
    kl = 0.2 * LOG(0.2 / 0.25) + 0.8 * LOG(0.8 / 0.75)
    expected = -LOG(0.75) - LOG(1.0001 - 0.25) + 500 * kl * (1.0000001 - 0.8)
    assert mart(z, z_adv, y, 500.0, probability(z, y)).item() == pytest.approx(expected, rel=1e-4)


def test_trades_sends_gradient_into_the_natural_side_too():
    z, z_adv = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    (grad,) = torch.autograd.grad(divergence(z, z_adv).sum(), z)
    assert (grad.abs().sum(1) > 0).all()


def reading(main: torch.Tensor, *heads: torch.Tensor) -> Reading:
    return Reading(main, {f"h{i}": z for i, z in enumerate(heads)}, {})


@given(st.integers(1, 3), st.floats(0, 4), st.sampled_from(["rt", "sat", "trades", "mart"]), st.integers(0, 99))
def test_every_recipe_adds_the_heads_mean_with_weight_lam(heads, lam, recipe, seed):
    g = torch.Generator().manual_seed(seed)
    natural, adversarial = (reading(*(torch.randn(5, 4, generator=g) for _ in range(heads + 1))) for _ in range(2))
    y = torch.randint(0, 4, (5,), generator=g)

    def alone(name: str, weight: str = "main") -> torch.Tensor:
        pick = (lambda r: r.heads[name]) if name else (lambda r: r.logits)
        judge = pick(natural) if weight == "own" else natural.logits
        return {
            "rt": F.cross_entropy(pick(natural), y),
            "sat": F.cross_entropy(pick(adversarial), y),
            "trades": trades(pick(natural), pick(adversarial), y, 3.0),
            "mart": mart(pick(natural), pick(adversarial), y, 3.0, probability(judge, y)),
        }[recipe]

    for weight in ("main", "own"):
        got, log = Usual(recipe, lam=lam, beta=3.0, weight=weight).combine(natural, adversarial, y)
        mean = sum(alone(h, weight) for h in natural.heads) / heads
        assert got.item() == pytest.approx((alone("") + lam * mean).item(), rel=1e-4)
        assert log["heads"].item() == pytest.approx(mean.item(), rel=1e-4)


def test_what_the_inner_attack_climbs():
    seen = reading(torch.randn(4, 3), torch.randn(4, 3), torch.randn(4, 3))
    y = torch.tensor([0, 1, 2, 0])
    ce = [F.cross_entropy(z, y, reduction="none") for z in (seen.logits, *seen.heads.values())]
    full = Usual("sat", lam=2.0).objective(seen, None, y)
    assert torch.allclose(full, ce[0] + 2 * (ce[1] + ce[2]) / 2)
    assert torch.allclose(Usual("sat", lam=2.0, inner="aux").objective(seen, None, y), (ce[1] + ce[2]) / 2)
    natural = reading(*(torch.randn(4, 3) for _ in range(3)))
    pairs = zip((natural.logits, *natural.heads.values()), (seen.logits, *seen.heads.values()), strict=True)
    kl = [divergence(a, b) for a, b in pairs]
    assert torch.allclose(Usual("trades", lam=0.5).objective(seen, natural, y), kl[0] + 0.5 * (kl[1] + kl[2]) / 2)
    assert torch.allclose(Usual("sat", inner="aux").objective(reading(seen.logits), None, y), ce[0])


class Spy(nn.Module):
    """One mask; remembers in which mode and with which labels it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Linear(4, 3)
        self.select = Select()
        self.norm = nn.BatchNorm1d(4)
        self.out = nn.Linear(4, 3)
        self.calls: list[tuple[bool, bool]] = []

    def forward(self, x):
        a = self.norm(x.flatten(1))
        self.calls.append((self.training, self.select.labels is not None))
        return self.out(a * self.select(self.scores(a), self.scores.weight))


SURFACE = Surface(heads={"head1": Head("scores")})
IMAGES, LABELS = torch.rand(6, 1, 2, 2), torch.tensor([0, 1, 2, 0, 1, 2])


def step(stage: Usual, model: Spy, threat: Threat) -> torch.Tensor:
    preset = Preset(1, steps=3)
    with Reader(model, SURFACE) as read, training_step():
        ctx = Context(preset, threat, 3, SURFACE, read, torch.Generator().manual_seed(0))
        adversary = stage.adversary(ctx)
        x_adv = adversary(model.train(), IMAGES, LABELS) if adversary else None
        loss, _ = stage.loss(model, IMAGES, LABELS, Context(**{**vars(ctx), "x_adv": x_adv}))
    loss.backward()
    return x_adv if x_adv is not None else IMAGES


@pytest.mark.parametrize(
    ("stage", "inner", "outer"),
    [
        (Usual("rt", lam=1.0), [], [(True, True)]),
        (Usual("sat", lam=1.0), [(False, False)] * 3, [(True, True)]),
        (Usual("sat", lam=1.0, mask="label"), [(False, True)] * 3, [(True, True)]),
        (Usual("sat", lam=1.0, labels="own"), [(False, False)] * 3, [(True, False)]),
        (Usual("trades", lam=1.0, beta=1.0), [(False, False)] * 4, [(True, True)] * 2),
        (Usual("mart", lam=1.0, beta=1.0), [(False, False)] * 3, [(True, True)] * 2),
    ],
)
def test_modes_and_labels_of_every_pass(stage, inner, outer):
    model = Spy()
    step(stage, model, Threat("Linf", "0.1"))
    assert model.calls == inner + outer
    assert model.training
    assert model.select.labels is None
    assert model.scores.weight.grad is not None


def test_the_mask_gets_gradient_as_classifier_and_as_mask():
    model = Spy()
    step(Usual("rt", lam=0.0), model, Threat("Linf", "0.1"))
    as_mask = model.scores.weight.grad.clone()
    assert (as_mask.abs().sum(1) > 0).all()  # the main loss reaches the true labels' rows
    assert not model.scores.bias.grad.any()  # the choice itself carries none
    model.zero_grad()
    step(Usual("rt", lam=1.0), model, Threat("Linf", "0.1"))
    assert not torch.allclose(model.scores.weight.grad, as_mask)
    assert model.scores.bias.grad.any()


@pytest.mark.parametrize("threat", [Threat("Linf", "0.1"), Threat("L2", "0.3"), Threat("Linf", "0")])
@pytest.mark.parametrize("recipe", ["sat", "trades", "mart"])
def test_adversarial_images_keep_to_ball_and_box(threat, recipe):
    x_adv = step(Usual(recipe, lam=1.0, beta=1.0), Spy(), threat)
    assert threat.inside(IMAGES, x_adv).all()
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert not x_adv.requires_grad


def test_ascent_reaches_the_maximum_of_a_linear_objective():
    x = torch.full((2, 1, 2, 2), 0.5)
    slope = torch.tensor([1.0, -2.0, 3.0, -4.0]).view(1, 1, 2, 2)
    for threat, expected in (
        (Threat("Linf", "0.1"), 0.1 * slope.sign()),
        (Threat("L2", "0.1"), 0.1 * slope / slope.norm()),
    ):
        got = ascend(
            lambda p: (p * slope).flatten(1).sum(1), x, threat, steps=100, step=0.02, generator=torch.Generator()
        )
        assert torch.allclose(got - x, expected.expand_as(x), atol=1e-4)


@given(st.sampled_from(["Linf", "L2"]), st.sampled_from(["uniform", "normal", "none"]), st.integers(0, 9))
def test_start_points_are_inside(norm, start, seed):
    threat, g = Threat(norm, "0.2"), torch.Generator().manual_seed(seed)
    x = torch.rand(4, 1, 3, 3, generator=g)
    point = start_point(x, threat, start, g)
    assert threat.inside(x, point).all()
    assert (point == x).all() == (start == "none")


def test_evaluating_gives_each_module_its_own_mode_back():
    model = Spy().train()
    model.norm.eval()

    def inside() -> None:
        with evaluating(model):
            assert not model.training
            assert not model.out.training
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        inside()
    assert model.training
    assert model.out.training
    assert not model.norm.training
