"""A surrogate is worn for one pass, undone always, and never mistaken for the model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from arena.attack import GateTerm, Query
from arena.errors import ArenaError
from arena.selection import HARD, Mode, Select
from arena.surface import Gate, Head, Knob, Selection, Surface
from arena.surrogate import Surrogate, posing
from arena.target import Target

K = 3


class Actor(nn.Module):
    """Has everything that can be declared, and every part matters to the logits."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.score = nn.Linear(4, K)
        self.select = Select()
        self.gate = nn.Sequential(nn.Linear(4, 1), nn.Sigmoid(), nn.Flatten(0))
        self.mask = nn.Sigmoid()
        self.temperature = 0.5
        self.sharp = nn.Parameter(torch.tensor([2.0]))
        self.angry = False
        for p in self.parameters():
            p.data.copy_(torch.randn(p.shape, generator=generator))

    def forward(self, x):
        if self.angry:
            raise RuntimeError("no")
        flat = x.flatten(1)
        scores = self.score(flat)
        chosen = self.select(scores, self.score.weight)
        weight = self.gate(flat).unsqueeze(1)
        first = self.mask(scores / self.temperature) * chosen[:, :K]
        return weight * first * self.sharp + (1 - weight) * scores.flip(1)


SURFACE = Surface(
    heads={"score": Head("score")},
    gates={"gate": Gate("gate"), "mask": Gate("mask", shape="element")},
    selections={"select": Selection("select", scores="score"), "foreign": Selection(scores="score")},
    knobs={
        "temperature": Knob("", "temperature", values=(5.0,)),
        "sharp": Knob("", "sharp"),
        "angry": Knob("", "angry", "constant"),
        "lost": Knob("", "nowhere"),
    },
)
SETTINGS = {
    "mode": Surrogate(modes={"select": Mode("soft", temperature=2.0)}),
    "forced": Surrogate(modes={"select": Mode("forced", classes=torch.tensor([0, 1, 2, 0, 1]))}),
    "gate": Surrogate(gates={"gate": torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])}),
    "mask": Surrogate(gates={"mask": 0.5}),
    "knob": Surrogate(knobs={"temperature": 5.0}),
    "parameter": Surrogate(knobs={"sharp": -1.0}),
    "all": Surrogate({"select": Mode("straight_through")}, {"gate": 0.5, "mask": 0.0}, {"temperature": 9.0}),
}


@pytest.fixture
def actor():
    return Actor().eval()


@pytest.fixture
def points():
    return torch.rand(5, 1, 2, 2, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 0, 1])


def asked(target, points, surrogate, **more):
    x, y = points
    more = {"objective": "margin", "weights": torch.ones(5, 2), "grad": True, **more}
    return target.answer(Query(x.unsqueeze(1), surrogate=surrogate, **more), y)


def state(model):
    hooks = sum(len(m._forward_hooks) for m in model.modules())
    return {k: v.clone() for k, v in model.state_dict().items()}, model.temperature, model.select.mode, hooks


def same(a, b):
    return a[1:] == b[1:] and all(torch.equal(v, b[0][k]) for k, v in a[0].items())


@pytest.mark.parametrize("draws", [1, 3])
def test_without_settings_the_surrogate_is_the_model(actor, points, draws):
    plain, posed = Target(actor, SURFACE, K), Target(actor, SURFACE, K)
    expected, got = asked(plain, points, None, draws=draws), asked(posed, points, Surrogate(), draws=draws)
    for part in ("values", "grad", "logits", "scores"):
        assert torch.equal(getattr(got, part), getattr(expected, part))
    assert posed.meter == plain.meter


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("draws", [1, 3])
def test_logits_are_the_models_own_and_the_rest_is_the_surrogates(actor, points, name, draws):
    target = Target(actor, SURFACE, K)
    plain, got = asked(target, points, None), asked(target, points, SETTINGS[name], draws=draws, looks=2)
    torch.testing.assert_close(got.logits, plain.logits)
    assert not torch.allclose(got.grad, plain.grad)
    target.meter.forwards = target.meter.backwards = 0
    asked(target, points, SETTINGS[name], draws=draws, looks=2)
    assert (target.meter.forwards, target.meter.backwards) == (5 * (draws + 2), 5 * draws)


def test_a_surrogate_that_lies_about_everything_breaks_nothing(actor, points):
    """With its sign turned the surrogate answers wrong everywhere; the model is right, and the answer says so."""
    x, _ = points
    target = Target(actor, SURFACE, K)
    y = target.logits(x).argmax(1)
    lying = Surrogate(knobs={"sharp": -1e6})
    answer = target.answer(Query(x.unsqueeze(1), "margin", surrogate=lying), y)
    assert (answer.values > 0).all()
    assert torch.equal(answer.logits[:, 0].argmax(1), y)
    assert not answer.errors.any()


@pytest.mark.parametrize("name", SETTINGS)
def test_everything_is_undone(actor, points, name):
    target = Target(actor, SURFACE, K)
    before = state(actor)
    asked(target, points, SETTINGS[name])
    assert same(state(actor), before)
    with posing(actor, SURFACE, SETTINGS[name]):
        assert not same(state(actor), before)
    assert same(state(actor), before)


def test_everything_is_undone_when_the_model_fails_half_way(actor, points):
    target = Target(actor, SURFACE, K)
    before = state(actor)
    failing = Surrogate(SETTINGS["all"].modes, SETTINGS["all"].gates, {"sharp": 3.0, "angry": True})
    with pytest.raises(RuntimeError, match="no"):
        asked(target, points, failing)
    assert same(state(actor), before)
    assert actor.angry is False
    asked(target, points, None)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Surrogate(modes={"selct": HARD}), "unknown selection 'selct'; did you mean 'select'"),
        (Surrogate(modes={"foreign": HARD}), "selection 'foreign' is no Select"),
        (Surrogate(gates={"gat": 1.0}), "unknown gate 'gat'"),
        (Surrogate(knobs={"sharp": 0.0, "lost": 1.0}), "knob 'lost': '' has no attribute 'nowhere'"),
    ],
)
def test_a_name_that_is_not_there_is_said_and_nothing_stays_set(actor, wrong, message):
    before = state(actor)
    with pytest.raises(ArenaError, match=message), posing(actor, SURFACE, wrong):
        pass
    assert same(state(actor), before)


def test_settings_of_each_row_follow_it(actor, points):
    """Rows one by one, in groups that want a gradient and not, and in small batches see what they see together."""
    x, y = points
    held = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    surrogate = Surrogate({"select": Mode("soft", torch.tensor([0.1, 1, 2, 5, 10.0]))}, {"gate": held})
    whole = asked(Target(actor, SURFACE, K), points, surrogate)
    mixed = asked(Target(actor, SURFACE, K), points, surrogate, grad=torch.tensor([True, False, True, False, True]))
    torch.testing.assert_close(mixed.values, whole.values)
    torch.testing.assert_close(mixed.grad[::2], whole.grad[::2])
    for k in range(5):
        row = torch.tensor([k])
        alone = Query(x[row].unsqueeze(1), "margin", torch.ones(1, 2), grad=True, surrogate=surrogate.rows(row))
        answer = Target(actor, SURFACE, K).answer(alone, y[row])
        torch.testing.assert_close(answer.values[0], whole.values[k])
        torch.testing.assert_close(answer.grad[0], whole.grad[k])


def test_only_the_declared_call_of_a_gate_is_held():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Sigmoid()

        def forward(self, x):
            return torch.cat((self.gate(x), self.gate(2 * x)), 1)

    model, x = Twice(), torch.ones(2, 1)
    with posing(model, Surface(gates={"second": Gate("gate", call=1)}), Surrogate(gates={"second": 0.0})):
        assert model(x).tolist() == [[pytest.approx(0.7311, abs=1e-4), 0.0]] * 2


# -- gate terms -----------------------------------------------------------------------------------------------------


def gate_term(weights, wanted, tolerance=0.0):
    return GateTerm(torch.tensor([weights] * 5), torch.tensor([wanted] * 5), tolerance)


def test_a_gate_term_is_minus_the_cross_entropy_and_its_gradient_drives_the_gate(actor, points):
    x, y = points
    target = Target(actor, SURFACE, K)
    gate = actor.gate(x.flatten(1)).detach()
    for wanted in (0.0, 1.0):
        query = Query(x.unsqueeze(1), grad=True, gates=gate_term([2.0, 0.0], [wanted, 0.5]))
        answer = target.answer(query, y)
        expected = 2 * (gate.log() if wanted else (1 - gate).log())
        torch.testing.assert_close(answer.values[:, 0], expected)
        torch.testing.assert_close(answer.gates[:, 0, 0], gate)
        moved = actor.gate((x + 1e-2 * answer.grad[:, 0].sign()).flatten(1))
        assert ((moved > gate) == bool(wanted)).all()


def test_a_gate_term_adds_to_the_objective_and_a_weight_of_zero_adds_nothing(actor, points):
    target = Target(actor, SURFACE, K)
    plain = asked(target, points, None, weights=None)
    none = asked(target, points, None, weights=None, gates=gate_term([0.0, 0.0], [1.0, 1.0]))
    assert torch.equal(none.values, plain.values)
    assert torch.equal(none.grad, plain.grad)
    some = asked(target, points, None, weights=None, gates=gate_term([1.0, 0.0], [1.0, 0.0]))
    gate = actor.gate(points[0].flatten(1)).detach()
    torch.testing.assert_close(some.values[:, 0], plain.values[:, 0] + gate.log())


def test_within_the_tolerance_a_gate_is_good_enough(actor, points):
    target = Target(actor, SURFACE, K)
    gate = actor.gate(points[0].flatten(1)).detach()
    wanted, tolerance = float(gate[0]), 1e-4
    answer = target.answer(
        Query(points[0].unsqueeze(1), grad=True, gates=gate_term([1.0, 0.0], [wanted, 0.0], tolerance)), points[1]
    )
    assert answer.values[0] == 0
    assert not answer.grad[0].any()
    assert (answer.values[1:] < 0).all()


def test_a_gate_with_many_values_counts_by_its_mean(actor, points):
    x, y = points
    answer = Target(actor, SURFACE, K).answer(Query(x.unsqueeze(1), gates=gate_term([0.0, 1.0], [0.0, 1.0])), y)
    mean = torch.sigmoid(actor.score(x.flatten(1)) / 0.5).mean(1).detach()
    torch.testing.assert_close(answer.values[:, 0], mean.log())


def test_a_held_gate_still_says_its_own_value(actor, points):
    x, y = points
    gates = gate_term([1.0, 0.0], [1.0, 0.0])
    answer = Target(actor, SURFACE, K).answer(
        Query(x.unsqueeze(1), surrogate=Surrogate(gates={"gate": 0.0}), gates=gates), y
    )
    torch.testing.assert_close(answer.gates[:, 0, 0], actor.gate(x.flatten(1)).detach())


def test_heads_can_climb_another_objective_than_the_logits(actor, points):
    target = Target(actor, SURFACE, K)
    both = asked(target, points, None, objective="margin", heads_objective="ce").values
    logits = asked(target, points, None, objective="margin", weights=torch.tensor([[1.0, 0.0]] * 5)).values
    head = asked(target, points, None, objective="ce", weights=torch.tensor([[0.0, 1.0]] * 5)).values
    torch.testing.assert_close(both, logits + head)


def test_for_random_models_the_logits_are_averaged_and_the_surrogate_keeps_its_number():
    query = Query(torch.zeros(3, 2, 1, 2, 2), draws=4)
    assert (query.averaged(20).draws, query.averaged(2).draws, query.averaged(20).forwards) == (20, 4, 40)
    posed = Query(torch.zeros(3, 2, 1, 2, 2), surrogate=SETTINGS["knob"]).averaged(20)
    assert (posed.draws, posed.looks, posed.forwards) == (1, 20, 42)


class Dice(nn.Module):
    """Answers class 1 with the chance of the first pixel; held at 1 by the knob it always does."""

    def __init__(self) -> None:
        super().__init__()
        self.always = False

    def forward(self, x):
        hit = (torch.rand(len(x)) < x[:, 0, 0, 0]) | self.always
        return torch.stack((0.5 * torch.ones(len(x)), hit * 100.0), 1)


@pytest.mark.parametrize("surrogate", [None, Surrogate(knobs={"always": True})])
def test_errors_are_the_share_of_the_models_own_draws_that_are_wrong(surrogate):
    """One lucky draw of a huge logit turns the mean of the logits, but not the share of wrong draws."""
    target = Target(Dice(), Surface(knobs={"always": Knob("", "always", "constant")}, random=True), 2)
    x = torch.zeros(3, 1, 1, 1)
    x[1:, 0, 0, 0] = torch.tensor([0.2, 1.0])
    torch.manual_seed(0)
    query = Query(x.unsqueeze(1), "margin", surrogate=surrogate).averaged(400)
    answer = target.answer(query, torch.zeros(3, dtype=torch.int64))
    assert answer.errors[[0, 2], 0].tolist() == [0, 1]
    assert 0.1 < answer.errors[1, 0] < 0.3
    assert answer.logits[1, 0].argmax() == 1
