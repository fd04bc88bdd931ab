"""The audit: each indicator speaks on its planted failure and is silent on an honest model; verdicts add up."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from arena.audit import AuditContext, again, audit, gradient_free_beats_gradients, verdict
from arena.audit import adaptive_beats_standard as adaptive_only
from arena.auditing import conduct, indicators, masking
from arena.auditing import planted as planting
from arena.auditing.probing import Points, Probe, direction, many
from arena.contender import seeded
from arena.datasets import digits, to_float
from arena.plugins import discover
from arena.referee import Referee
from arena.rng import Stream
from arena.specs import Indicator
from arena.surface import Gate, Surface
from arena.target import Target
from arena.threat import Threat

sys.path.insert(0, str(Path(__file__).parent / "packages" / "gallery"))
from arena_gallery import MEMBERS, broken

REGISTRY = discover()


@pytest.fixture(scope="module")
def base():
    """A small smooth network that knows digits, and test points that it knows."""
    images = digits()
    x, y = to_float(images.x_train), images.y_train
    with seeded(0):
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.Softplus(), nn.Linear(48, 10))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(150):
            rows = torch.randint(len(x), (128,))
            loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval().requires_grad_(False)
    index = images.subset(48)
    points = to_float(images.x_test[index]), images.y_test[index]
    right = (model(points[0]).argmax(1) == points[1]).nonzero().squeeze(1)[:24]
    assert len(right) == 24
    return model, Points(points[0][right], points[1][right], index[right])


class Wrapped(nn.Module):
    """A model with something in front of it."""

    def __init__(self, model, before=lambda x: x):
        super().__init__()
        self.model, self.before = model, before

    def forward(self, x):
        return self.model(self.before(x))


def probe(base, build=None, eps="0.1", norm="Linf", surface=None, standing=None):
    model, points = base
    build = build or (lambda: model)
    threat, surface = Threat.parse(norm, eps), surface or Surface()
    target = Target(build().eval(), surface, 10)
    referee = Referee(build(), threat, surface.random)
    stream = Stream.of(0, "audit")
    held = points if standing is None else standing
    return Probe(target, referee, build, threat, points, held, stream, REGISTRY, "arena match m --vs {}".format)


class Gradient(torch.autograd.Function):
    """The identity with another gradient: ``change(gradient, x)``."""

    @staticmethod
    def forward(ctx, x, change):
        ctx.save_for_backward(x)
        ctx.change = change
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.change(grad, ctx.saved_tensors[0]), None


def lying(base, change):
    return lambda: Wrapped(base[0], lambda x: Gradient.apply(x, change))


def on_grid(x):
    """Rows that nobody has moved: the data's grey levels are multiples of 1/16, rounded to 1/255."""
    return ((x * 16 - (x * 16).round()).abs() < 0.05).flatten(1).all(1).view(-1, 1, 1, 1)


def few_pixels_at_a_time(grad, x):
    """Which ones is as good as random."""
    wave = torch.sin(1e4 * x.flatten(1).sum(1, keepdim=True) + 7 * torch.arange(64))
    return grad * (wave > 0.9).view_as(grad)


class Branching(nn.Module):
    """A black-and-white picture is looked at instead as soon as the first column, black in all digits, is grey."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        grey = x[:, :, :, 0].amax((1, 2)).view(-1, 1) > 0.1
        return torch.where(grey, self.model((x > 0.5).to(x.dtype)), self.model(x))


class Remembering(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.seen = model, []

    def forward(self, x):
        out = self.model(x)
        for k, row in enumerate(x):
            old = [z for b, z in self.seen if bool((b - row).abs().max() < 0.3)]
            self.seen.append((row, out[k]))
            out[k] = old[0] if old else out[k]
        return out


class RandomOffImages(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(torch.where(on_grid(x), x, x + 0.1 * torch.randn_like(x)))


class Optimizing(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (grad,) = torch.autograd.grad(self.model(leaf).amax(1).sum(), leaf)
        return self.model(x + 0.01 * grad.sign())


def one_hot(base):
    return lambda: Wrapped(nn.Sequential(base[0], OneHot()))


class OneHot(nn.Module):
    def forward(self, z):
        return nn.functional.one_hot(z.argmax(1), 10).to(z.dtype)


class Times(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, z):
        return z * self.factor


PLANTED = {
    "zero_gradients": (masking.zero_gradients, lambda b: lying(b, lambda g, x: 0 * g), {}),
    "logit_scale above": (masking.logit_scale, lambda b: lambda: nn.Sequential(b[0], Times(1e6)), {}),
    "logit_scale below": (masking.logit_scale, lambda b: lambda: nn.Sequential(b[0], Times(1e-6)), {}),
    "gradient_agreement": (masking.gradient_agreement, lambda b: lying(b, lambda g, x: -g), {}),
    "noise_beats_gradient": (masking.noise_beats_gradient, lambda b: lying(b, lambda g, x: -g), {"eps": "0.05"}),
    "search_beats_gradient": (masking.search_beats_gradient, lambda b: lying(b, lambda g, x: 0 * g), {}),
    "boundary_jump rounded": (
        masking.boundary_jump,
        lambda b: lambda: Wrapped(b[0], lambda x: (4 * x).round() / 4),
        {},
    ),
    "boundary_jump one-hot": (masking.boundary_jump, one_hot, {}),
    "one_step_beats_many": (
        indicators.one_step_beats_many,
        lambda b: lying(b, lambda g, x: torch.where(on_grid(x), g, -g)),
        {"eps": "0.3"},
    ),
    "last_worse_than_best": (
        indicators.last_worse_than_best,
        lambda b: lying(b, lambda g, x: torch.where(on_grid(x), g, -g)),
        {"eps": "0.03"},
    ),
    "large_eps": (indicators.large_eps, lambda b: lying(b, lambda g, x: -g), {}),
    "eps_curve": (indicators.eps_curve, lambda b: lambda: Branching(b[0]), {"eps": "1"}),
    "budget_still_gains": (indicators.budget_still_gains, lambda b: lying(b, few_pixels_at_a_time), {"eps": "0.03"}),
    "break_point_angle": (indicators.break_point_angle, lambda b: lying(b, few_pixels_at_a_time), {"eps": "0.03"}),
    "still_breaks": (indicators.still_breaks, lambda b: lambda: b[0], {"eps": "0.3"}),
    "hidden_randomness": (conduct.hidden_randomness, lambda b: lambda: RandomOffImages(b[0]), {}),
    "memory": (conduct.memory, lambda b: lambda: Remembering(b[0]), {}),
    "optimizes_inside": (conduct.optimizes_inside, lambda b: lambda: Optimizing(b[0]), {}),
    "planted, no gradient": (planting.planted, lambda b: lying(b, lambda g, x: 0 * g), {}),
    "planted, false gradient": (planting.planted, lambda b: lying(b, lambda g, x: -g), {}),
}


@pytest.mark.parametrize("case", PLANTED)
def test_an_indicator_speaks_on_its_planted_failure(base, case):
    function, build, changes = PLANTED[case]
    found = function(probe(base, build(base), **changes))
    assert found.name == function.__name__ == case.partition(" ")[0].rstrip(",")
    assert found.flag, found
    assert found.evidence
    assert "arena match" in found.remedy or "play again" in found.remedy


@pytest.mark.parametrize(("norm", "eps"), [("Linf", "0.03"), ("Linf", "0.1"), ("L2", "0.3"), ("L2", "1")])
def test_all_are_silent_on_an_honest_model(base, norm, eps):
    seen = probe(base, norm=norm, eps=eps)
    alive = ~seen.climb(seen.sample, seen.threat, "margin", 60, 0.05).broken & ~seen.by_gradient
    rows = alive.nonzero().squeeze(1)
    s = seen.sample
    seen = probe(base, norm=norm, eps=eps, standing=Points(s.x[rows], s.y[rows], s.index[rows]))
    found = audit(AuditContext({"diagnosis": None}, (), (), seen))
    assert [i for i in found if i.flag] == []
    assert {i.name for i in found} >= set(indicators.BUILT_IN)


def test_the_same_audit_twice_is_the_same(base):
    made = [audit(AuditContext({}, (), (), probe(base, eps="0.05"))) for _ in range(2)]
    assert made[0] == made[1]


def test_a_crash_is_contained_named_and_speaks(base):
    def crash(probe):
        raise ZeroDivisionError("planted in an indicator")

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(indicators.BUILT_IN, "large_eps", crash)
        found = {i.name: i for i in audit(AuditContext({}, (), (), probe(base, eps="0.03")))}
    assert found["large_eps"].flag
    assert "ZeroDivisionError: planted in an indicator" in found["large_eps"].evidence
    assert set(found) >= set(indicators.BUILT_IN)


def test_a_declared_choice_that_adaptive_attacked_is_told_and_no_flag(base):
    surface = Surface(gates={"g": Gate("1", shape="element")})

    def build():
        return Wrapped(base[0], lambda x: (4 * x).round() / 4)

    seen = probe(base, build)
    assert masking.boundary_jump(seen).flag
    seen.target.surface = surface
    assert masking.boundary_jump(seen).flag
    seen.adaptive = True
    found = masking.boundary_jump(seen)
    assert not found.flag
    assert "jumps" in found.evidence


def test_one_odd_point_is_no_finding():
    assert not many(torch.tensor([True, True] + [False] * 20), 0.05)
    assert many(torch.tensor([True] * 3 + [False] * 20), 0.05)
    assert not many(torch.tensor([True] * 3 + [False] * 97), 0.05)
    assert many(torch.tensor([True]), 0.05)
    assert not many(torch.zeros(0, dtype=torch.bool), 0.05)


def test_the_planted_readout_is_fishers():
    generator = torch.Generator().manual_seed(0)
    inner, secret = torch.randn(30, 7, generator=generator), torch.randn(7, generator=generator)
    centred = (inner - inner.mean(0)).double()
    scatter = centred.T @ centred / 30
    ridge = planting.RIDGE * scatter.diagonal().mean() * torch.eye(7)
    way = torch.linalg.solve(scatter + ridge, (secret - inner.mean(0)).double())
    assert torch.allclose(planting._separate(inner, secret).double(), way / way.norm(), atol=1e-6)


def test_one_survivor_that_falls_is_no_finding(base):
    s = base[1]
    few = Points(s.x[:2], s.y[:2], s.index[:2])
    found = indicators.still_breaks(probe(base, eps="0.3", standing=few))
    assert found.value == 1.0
    assert not found.flag


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_a_tiny_gradient_still_has_a_direction(norm):
    grad = torch.tensor([3e-30, -4e-30]).view(1, 1, 1, 2)
    step = direction(grad, norm).flatten()
    expected = torch.tensor([1.0, -1.0]) if norm == "Linf" else torch.tensor([0.6, -0.8])
    assert torch.allclose(step, expected)


# -- rows of the match -------------------------------------------------------------------------------------------


def played(name, knowledge, broken, group="x"):
    spec = SimpleNamespace(spec=SimpleNamespace(knowledge=knowledge))
    planned = SimpleNamespace(name=name, spec=spec)
    mask = torch.zeros(50, dtype=torch.bool)
    mask[list(broken)] = True
    return SimpleNamespace(planned=planned, broken=mask, silent=0, met=torch.ones(50, dtype=torch.bool), group=group)


RECORD = {
    "defense": "my.py:make",
    "asked": {
        "dataset": "digits",
        "backbone": None,
        "threat": {"norm": "Linf", "eps": "0.2"},
        "n": 50,
        "seed": 3,
        "train_seed": 0,
        "checkpoint": "w.safetensors",
    },
    "model": {"trained": {"weights": "checkpoint", "checkpoint": "w.safetensors"}},
}


@pytest.mark.parametrize(
    ("white", "black", "flag"), [(range(5), range(8), True), (range(5), range(5), False), (range(5), range(7), False)]
)
def test_breaks_without_gradients_that_gradients_miss(white, black, flag):
    rows = (played("pgd", "white-box", white), played("square", "score-based", black))
    found = gradient_free_beats_gradients(AuditContext(RECORD, (), rows))
    assert found.flag is flag
    assert found.value == len(set(black) - set(white)) / 50
    if flag:
        assert "square alone" in found.evidence


def test_square_alone_beats_nobody():
    rows = (played("square", "score-based", range(20)),)
    assert not gradient_free_beats_gradients(AuditContext(RECORD, (), rows)).flag


@pytest.mark.parametrize(("adaptive", "flag"), [(range(10), True), (range(4), False)])
def test_adaptive_beats_standard_by_a_margin(adaptive, flag):
    rows = (
        played("apgd_ce", "white-box", range(4), "autoattack"),
        played("head", "white-box", adaptive, "adaptive"),
    )
    assert adaptive_only(AuditContext(RECORD, (), rows)).flag is flag


def test_a_remedy_asks_the_same_defense():
    line = again(RECORD, "square(queries=9)", "--audit", "deep")
    assert line == (
        "arena match my.py:make --vs 'square(queries=9)' --dataset digits --norm Linf --eps 0.2 -n 50 --seed 3 "
        "--checkpoint w.safetensors --audit deep"
    )


@pytest.mark.parametrize(
    ("flags", "audited", "said"),
    [
        ([], True, "clear"),
        ([], False, "not_audited"),
        ([(False, True)], True, "clear"),
        ([(True, False)], True, "suspect"),
        ([(True, False)], False, "suspect"),
        ([(True, False), (True, True)], True, "void"),
        ([(False, True), (True, False)], True, "suspect"),
    ],
)
def test_verdicts(flags, audited, said):
    assert verdict([Indicator("i", flag, fatal=fatal) for flag, fatal in flags], audited) == said


# -- the gallery -------------------------------------------------------------------------------------------------


class Frame(nn.Module):
    """The base as a backbone whose ReLUs can be seen."""

    def __init__(self, model):
        super().__init__()
        self.one, self.two = model[1], model[3]

    def forward(self, x):
        return self.two(torch.relu(self.one(x.flatten(1))))


@pytest.mark.parametrize("member", [m for m in MEMBERS if m != "hard_mask"])
def test_a_broken_member_still_knows_clean_images(base, member):
    """So that what it shows is its mechanism, and not a ruined model."""
    model, points = base
    build = getattr(broken, f"build_{MEMBERS[member][0].lower()}")
    wrapped = build(Frame(model), None).eval()
    with seeded(0):
        right = (wrapped(points.x).argmax(1) == points.y).float().mean()
    assert right > 0.6
    assert {n.partition(".")[0] for n in wrapped.state_dict()} == {"one", "two"}  # rt's weights fit


def test_the_gallery_says_what_is_broken_and_what_its_twin_is():
    from arena_gallery import arena_register_defenses

    specs = list(arena_register_defenses())
    assert len(specs) >= 18
    assert len({s.build for s in specs}) >= len(specs) - 1  # noise stands in it twice: declared and not
    for spec in specs:
        assert spec.summary
        assert spec.twin == "rt"
        assert hasattr(broken, spec.build.partition(":")[2])
        assert hasattr(broken, spec.recipe.partition(":")[2])


def test_the_knee_is_90_degrees_at_once_and_180_never():
    time = torch.linspace(0, 1, 81)
    at_once = torch.where(time > 0, 0.0, 1.0)
    even = 1 - time
    curves = torch.stack([at_once, even, 3 * even - 7, torch.zeros(81), (1 - 4 * time).clamp_min(0)], 1)
    angle = indicators.knee(curves)
    assert angle[0] == pytest.approx(90, abs=1)
    assert angle[1:3].tolist() == pytest.approx([180, 180], abs=0.1)  # neither scale nor offset counts
    assert angle[3] == 90
    assert angle[4] == pytest.approx(90 + 14.04, abs=1)  # atan(1/4) off the perpendicular
