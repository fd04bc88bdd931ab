"""Attacks on surrogates find what hard choices, gates and knobs hide, and do nothing where there is none of them."""

import pytest
import torch
from torch import nn

from arena.attack import Unsupported
from arena.selection import Select
from arena.specs import text
from arena.surface import Gate, Head, Knob, Selection, Surface


def images(x, quadrant):
    """Mean of one quadrant of (N, 1, 4, 4), (N,)."""
    i, j = divmod(quadrant, 2)
    return x[:, 0, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((1, 2))


class Decoder(nn.Module):
    """Answers which mask was chosen, and nothing else: the image never reaches the logits but by the choice.

    Class k's score is the brightness of quadrant k; a bias keeps class 0 ahead on every clean image.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Identity()
        self.select = Select()
        self.table = nn.Parameter(torch.eye(3))

    def forward(self, x):
        scores = self.scores(torch.stack((images(x, 0) + 0.3, images(x, 1), images(x, 2)), 1) * 20)
        return self.select(scores, self.table)


MASKED = Surface(heads={"scores": Head("scores")}, selections={"mask": Selection("select", scores="scores")})
SOFT = Surface(selections={"mask": Selection("select")})


def opponents(fight, name, model, surface, eps="0.2", **options):
    f = fight(name, model, shape=(1, 4, 4), eps=eps, surface=surface, low=0.45, high=0.55, n=9, **options)
    assert (f.y == 0).all()
    return f


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("relaxed", {"steps": 10}),
        ("relaxed", {"steps": 40, "by": "pgd"}),
        ("relaxed", {"steps": 10, "kind": "straight_through"}),
        ("relaxed", {"steps": 40, "kind": "straight_through", "by": "pgd", "loss": "dlr"}),
        ("relaxed", {"steps": 10, "loss": "dlr_targeted", "restarts": 1, "hot": 1.0}),
        ("forced", {"steps": 10}),
        ("joint_t", {"steps": 10}),
        ("joint_t", {"steps": 10, "weights": "first"}),
        ("joint_t", {"steps": 10, "weights": "order"}),
        ("steer", {"steps": 10}),
    ],
)
def test_what_a_hard_choice_hides_is_found(fight, name, options):
    for plain, how in (("pgd", {"restarts": 5}), ("apgd_ce", {}), ("apgd_dlr", {}), ("apgd_t", {"steps": 20})):
        f = opponents(fight, plain, Decoder(), MASKED, **how)
        assert not f.broken(f.run()).any()
    f = opponents(fight, name, Decoder(), MASKED, **options)
    outcome = f.run()
    assert f.broken(outcome).all(), outcome.trace
    assert (outcome.forwards < f.attack.passes()[0]).all()


def test_relaxing_needs_no_head_but_forcing_and_heads_attacks_do(fight):
    f = opponents(fight, "relaxed", Decoder(), SOFT, steps=10)
    assert f.broken(f.run()).all()
    with pytest.raises(Unsupported, match="forced needs a selection scored by a head"):
        opponents(fight, "forced", Decoder(), SOFT)


class Saturated(nn.Module):
    """A mask so sharp that in float32 its slope is exactly 0, until the temperature is raised."""

    def __init__(self) -> None:
        super().__init__()
        self.tau = 1e-5

    def forward(self, x):
        m = torch.sigmoid((images(x, 1) - images(x, 0) - 0.3) / self.tau)
        return torch.stack((1 - m, m), 1)


@pytest.mark.parametrize(
    ("options"),
    [{"knob": "tau", "value": "1"}, {}, {"loss": "dlr"}, {"loss": "dlr_targeted"}, {"knob": "tau", "loss": "margin"}],
)
def test_what_a_low_temperature_hides_is_found(fight, options):
    surface = Surface(knobs={"tau": Knob("", "tau", values=(0.01, 1.0))})
    f = opponents(fight, "pgd", Saturated(), surface, restarts=5)
    assert not f.broken(f.run()).any()
    f = opponents(fight, "knob", Saturated(), surface, steps=10, **options)
    assert f.broken(f.run()).all()


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("false", False), ("3", 3), ("0.5", 0.5), ("1/4", 0.25), ("own", "own")]
)
def test_a_knobs_value_is_read_as_what_it_is(text, value):
    from arena_attacks.through import read

    assert (type(read(text)), read(text)) == (type(value), value)


class Detector(nn.Module):
    """A gate in front of two branches. Closed, the answer is 0 whatever the image, and its slopes mislead.

    Open, quadrant 1 decides. Quadrant 3 opens; darkening both is what the closed branch seems to want.
    """

    def __init__(self, opens: bool) -> None:
        super().__init__()
        self.gate = nn.Identity()
        self.opens = opens

    def forward(self, x):
        score = 60 * (images(x, 3) - 0.65)
        w = self.gate(torch.sigmoid(score if self.opens else -score))
        way = w if self.opens else 1 - w
        weak = 20 * (images(x, 1) - 0.6)
        strong = -1.7 - 1.2 * torch.tanh(10 * (images(x, 3) - 0.5)) - (images(x, 1) - 0.5)
        margin = way * weak + (1 - way) * strong
        return torch.stack((torch.zeros_like(margin), margin), 1)


@pytest.mark.parametrize("clean", [0, 1])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gate_pgd", {"b": 10.0, "steps": 40}),
        ("gate_pgd", {"b": 10.0, "steps": 40, "loss": "margin", "gate": "detector"}),
        ("gate_held", {}),
        ("gate_held", {"loss": "ce", "restarts": 2}),
    ],
)
def test_what_a_gate_guards_is_found(fight, name, options, clean):
    """The clean value opens; for clean = 0 the gate's sense is turned."""
    surface = Surface(gates={"detector": Gate("gate", clean=clean)})
    plain = opponents(fight, "pgd", Detector(bool(clean)), surface)
    assert not plain.broken(plain.run()).any()
    options = options | ({"to": "clean"} if name == "gate_pgd" else {"value": float(clean)})
    f = opponents(fight, name, Detector(bool(clean)), surface, **options)
    assert f.broken(f.run()).all()
    away = {"to": "other"} if name == "gate_pgd" else {"value": 1.0 - clean}
    f = opponents(fight, name, Detector(bool(clean)), surface, **options | away)
    assert not f.broken(f.run()).any()


def test_a_held_gate_without_push_does_not_open(fight):
    surface = Surface(gates={"detector": Gate("gate")})
    f = opponents(fight, "gate_held", Detector(True), surface, push=0.0)
    assert not f.broken(f.run()).any()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("relaxed", {}, "relaxed needs a selection that is a Select; the surface declares none"),
        ("forced", {}, "forced needs a selection scored by a head"),
        ("knob", {}, "knob needs a temperature or detach knob with values; the surface declares none"),
        ("knob", {"knob": "tau"}, r"no knob 'tau' on the surface \(knobs: none\)"),
        ("joint_t", {}, "joint_t needs heads; the surface declares none"),
        ("steer", {}, "steer needs heads; the surface declares none"),
        ("gate_pgd", {}, "gate_pgd needs gates; the surface declares none"),
        ("gate_held", {}, "gate_held needs gates; the surface declares none"),
    ],
)
def test_without_the_surface_it_needs_an_attack_says_so(fight, models, name, options, message):
    with pytest.raises(Unsupported, match=message):
        fight(name, models.linear((1, 4, 4), 3), shape=(1, 4, 4), **options)


@pytest.mark.parametrize("value", [None, (1, 2), "1/2", "true", 0.5])
def test_a_declared_value_of_a_knob_is_set_as_it_was_declared(fight, models, value):
    surface = Surface(knobs={"tau": Knob("", "tau", values=(3.0, value))})
    attack = fight("knob", models.rich((1, 4, 4), 3), shape=(1, 4, 4), surface=surface, knob="tau", value=text(value))
    assert attack.attack.pose({}, None).knobs == {"tau": value}


def test_a_gate_or_knob_that_is_not_there_is_said(fight, models):
    for name, options, message in (
        ("gate_pgd", {"gate": "lock"}, r"no gate 'lock' on the surface \(gates: gate\)"),
        ("knob", {"knob": "tua"}, r"no knob 'tua' on the surface \(knobs: tau\)"),
    ):
        with pytest.raises(Unsupported, match=message):
            fight(name, models.rich((1, 4, 4), 3), shape=(1, 4, 4), surface=models.full, **options)


def test_a_box_step_under_linf_is_refused_as_it_would_change_nothing(fight, models):
    with pytest.raises(Unsupported, match="way=box: under Linf each pixel steps by itself"):
        fight("pgd", models.linear((1, 4, 4), 3), shape=(1, 4, 4), way="box")


class Dark(nn.Module):
    """Steepest where black pixels would have to become darker still; the white corner pays a little."""

    def forward(self, x):
        value = 2 * (x[:, 0, 0, 0] - 0.7) - 40 * x[:, 0, 2:].sum((1, 2))
        return torch.stack((torch.zeros_like(value), value), 1)


def test_a_box_aware_step_is_not_spent_on_pixels_that_cannot_move(fight):
    outcomes = {}
    for way in ("plain", "box"):
        f = fight("pgd", Dark(), shape=(1, 4, 4), norm="L2", eps="0.5", low=0.4, high=0.5, n=9,
                  steps=4, random_start=False, way=way)  # fmt: skip
        f.x[:, 0, 2:] = 0.0
        f.y[:] = 0
        outcomes[way] = f.broken(f.run())
    assert outcomes["box"].all()
    assert not outcomes["plain"].any()


def test_a_tangential_step_has_no_part_along_brightness_and_contrast():
    from arena_attacks.ways import tangent

    generator = torch.Generator().manual_seed(0)
    x, g = torch.rand(3, 2, 5, 5, generator=generator), torch.randn(3, 2, 5, 5, generator=generator)
    left = tangent(x, g)
    for way in (x, torch.ones_like(x)):
        assert ((left * way).sum((2, 3)).abs() < 1e-5).all()
    torch.testing.assert_close(tangent(x, left), left)
    assert tangent(x, 3 * x + 2).abs().max() < 1e-5


class Flat(nn.Module):
    """Two classes by the brightness of the image; with ``blind`` no gradient reaches the image."""

    def __init__(self, blind: bool) -> None:
        super().__init__()
        self.blind = blind
        self.scale = nn.Parameter(torch.tensor(20.0))

    def forward(self, x):
        mean = (x.detach() if self.blind else x).mean((1, 2, 3))
        return torch.stack((mean - 0.45, 0.45 - mean), 1) * self.scale


def test_transfer_breaks_what_hides_its_gradient(fight):
    """The twin shows the way that the model hides; what counts is the model's own answer."""
    twin = Flat(blind=False).eval().requires_grad_(False)
    blind = opponents(fight, "pgd", Flat(blind=True), None, eps="0.1", steps=20, random_start=False)
    assert not blind.broken(blind.run()).any()
    lent = opponents(fight, "transfer", Flat(blind=True), None, eps="0.1", steps=20, sources={"rt": twin})
    before = lent.target.meter.forwards
    outcome = lent.run()
    assert (outcome.forwards % 2 == 0).all()  # each point is seen by both
    assert outcome.forwards.sum() == lent.target.meter.forwards - before
    assert lent.broken(outcome).all()


def test_transfer_from_a_model_of_no_use_breaks_nothing(fight):
    """A source that points the wrong way is believed by nobody."""

    class Turned(Flat):
        def forward(self, x):
            return -super().forward(x)

    lent = opponents(
        fight, "transfer", Flat(blind=False), None, eps="0.1", steps=20, sources={"rt": Turned(blind=False).eval()}
    )
    assert not lent.broken(lent.run()).any()


def test_transfer_without_a_source_is_unsupported(fight):
    with pytest.raises(Unsupported, match="no other model is at hand, 'rt' neither"):
        opponents(fight, "transfer", Flat(blind=False), None)
