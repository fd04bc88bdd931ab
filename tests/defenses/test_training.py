"""IAT and FAT: mixing and stopping by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from arena_defenses import fat, iat
from torch import nn

from arena.plugins import registry
from arena.selection import training_step
from arena.specs import Preset, complete, load
from arena.stages import Context
from arena.surface import Reader, Surface
from arena.threat import Threat


def context(model, preset, epoch=0, eps="0.3"):
    read = Reader(model, Surface())
    generator = torch.Generator().manual_seed(0)
    return Context(preset, Threat.parse("Linf", eps), 3, Surface(), read, generator, epoch), read


def test_mix_by_hand():
    mix = iat.Mix(0.75, torch.tensor([1, 0]))
    assert torch.equal(mix.images(torch.tensor([[4.0], [8.0]])), torch.tensor([[5.0], [7.0]]))
    logits = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]])  # probabilities (3/4, 1/4) and (1/2, 1/2)
    got = mix.cross_entropy(logits, torch.tensor([0, 1]))
    row = 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    assert float(got) == pytest.approx((row + math.log(2)) / 2)


def test_a_share_of_one_mixes_nothing():
    mix = iat.Mix(1.0, torch.tensor([1, 2, 0]))
    x, y = torch.rand(3, 2), torch.arange(3)
    assert torch.equal(mix.images(x), x)
    assert torch.equal(mix.cross_entropy(torch.eye(3), y), F.cross_entropy(torch.eye(3), y))


@pytest.mark.parametrize(("alpha", "variance"), [(1.0, 1 / 12), (4.0, 1 / 36)])
def test_draws_follow_beta(alpha, variance):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    mixes = [iat.draw(5, alpha, generator) for _ in range(2000)]
    shares = torch.tensor([m.share for m in mixes])
    assert shares.mean() == pytest.approx(0.5, abs=0.03)
    assert shares.var() == pytest.approx(variance, rel=0.1)
    assert all(sorted(m.partner.tolist()) == list(range(5)) for m in mixes[:20])


def test_iat_mixes_each_half_by_a_draw_of_its_own_and_attacks_unmixed_images(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    x, y = torch.rand(6, 1, 4, 4), torch.arange(6) % 3
    stage = iat.Interpolated(alpha=1.0)
    ctx, read = context(model, Preset(1, steps=2))
    with read:
        with training_step():
            x_adv = stage.adversary(ctx)(model, x, y)
        assert 0 < (x_adv - x).abs().max() <= 0.3 + 1e-6
        object.__setattr__(ctx, "x_adv", x_adv)
        draws = []

        def draw(n, alpha, generator):
            draws.append(iat.Mix(0.9 - 0.5 * len(draws), torch.arange(n).roll(1 + len(draws))))
            return draws[-1]

        monkeypatch.setattr(iat, "draw", draw)
        loss, log = stage.loss(model, x, y, ctx)
    assert len(draws) == 2
    halves = [m.cross_entropy(model(m.images(t)), y) for m, t in zip(draws, (x, x_adv), strict=True)]
    assert torch.allclose(loss, (halves[0] + halves[1]) / 2)
    assert torch.allclose(log["natural"], halves[0])
    assert torch.allclose(log["adversarial"], halves[1])
    assert loss.requires_grad


def test_patience_rises_in_equal_parts():
    assert [fat.patience(e, 8, 3, "rising") for e in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert {fat.patience(e, 8, 3, "constant") for e in range(8)} == {3}
    assert {fat.patience(e, 8, 0, "rising") for e in range(8)} == {0}


class Line(nn.Module):
    """One pixel v: class 1 from v >= 0.5 on, else class 0; remembers how many rows each pass had."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def forward(self, x):
        self.rows.append(len(x))
        v = x.flatten(1)
        return torch.cat((0.5 - v, v - 0.5), 1)


@pytest.mark.parametrize(("tau", "ends"), [(0, [0.52, 0.51, 0.54]), (1, [0.58, 0.57, 0.54]), (2, [0.64, 0.63, 0.54])])
def test_steps_after_the_first_misclassification(monkeypatch, tau, ends):
    monkeypatch.setattr(fat, "start_point", lambda x, *_: x)
    # Two and five steps of 0.06 to the other class; the last never gets there.
    x = torch.tensor([0.4, 0.21, 0.99]).view(3, 1, 1, 1)
    y = torch.tensor([0, 0, 1])
    threat = Threat.parse("Linf", "0.45")
    model = Line().eval()
    got = fat.ascend_friendly(
        model, x, y, threat, tau=tau, steps=20, step=0.06, generator=torch.Generator().manual_seed(0)
    ).flatten()
    assert torch.allclose(got, torch.tensor(ends))
    assert not got.requires_grad


def test_rows_at_rest_leave_the_batch_and_all_at_rest_end_it(monkeypatch):
    monkeypatch.setattr(fat, "start_point", lambda x, *_: x)
    x, y = torch.tensor([0.6, 0.45]).view(2, 1, 1, 1), torch.tensor([0, 0])  # the first is wrong from the start
    model = Line().eval()
    got = fat.ascend_friendly(
        model,
        x,
        y,
        Threat.parse("Linf", "0.5"),
        tau=0,
        steps=20,
        step=0.1,
        generator=torch.Generator().manual_seed(0),
    )
    assert torch.allclose(got.flatten(), torch.tensor([0.6, 0.55]))
    assert model.rows == [2, 1]


def test_without_a_break_it_is_plain_pgd():
    from arena.inner import ascend

    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval()
    x = torch.rand(20, 1, 4, 4)
    y = model(x).argmax(1)
    threat = Threat.parse("Linf", "0.001")
    make = lambda: torch.Generator().manual_seed(1)  # noqa: E731
    got = fat.ascend_friendly(model, x, y, threat, tau=0, steps=4, step=0.0005, generator=make())
    keep = model(got).argmax(1) == y
    assert int(keep.sum()) > 10
    value = lambda p: F.cross_entropy(model(p), y, reduction="none")  # noqa: E731
    plain = ascend(value, x, threat, steps=4, step=0.0005, generator=make())
    assert torch.equal(got[keep], plain[keep])


def test_fat_attacks_in_eval_mode_and_gives_the_mode_back():
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 3)).train()
    modes = set()
    model[1].register_forward_hook(lambda m, _i, _o: modes.add(m.training))
    ctx, read = context(model, Preset(4, steps=3), epoch=3)
    with read, training_step():
        found = fat.Friendly().adversary(ctx)(model, torch.rand(6, 1, 4, 4), torch.arange(6) % 3)
    assert modes == {False}
    assert model.training
    assert found.shape == (6, 1, 4, 4)


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("iat", {}, iat.Interpolated(alpha=1.0)),
        ("iat", {"alpha": 0.2}, iat.Interpolated(alpha=0.2)),
        ("fat", {}, fat.Friendly(tau=3, schedule="rising")),
        ("fat", {"tau": 1, "schedule": "constant"}, fat.Friendly(tau=1, schedule="constant")),
    ],
)
def test_registered(name, given, expected):
    spec = registry().get("defense", name).spec
    (stage,) = load(spec.recipe)(**complete(name, spec.options, given))
    assert stage == expected
    assert stage.adversarial
    assert {"digits", "cifar10", "*"} <= set(spec.presets)
    assert not spec.module
    if name == "iat":
        assert {p.steps for p in spec.presets.values()} == {7}
