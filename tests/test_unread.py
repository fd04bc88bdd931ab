"""Learned parts that no declared surface reads: planted ones are named, declared ones and plain models give nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from arena.backbones import DatasetInfo
from arena.check import check_defense
from arena.plugins import registry
from arena.selection import Select
from arena.specs import complete, load
from arena.surface import Gate, Head, Knob, Selection, Surface
from arena.unread import unread

X = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(16) % 10


class Plain(nn.Module):
    """A network of two layers; subclasses hide things in ``between``."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU())
        self.classifier = nn.Linear(32, 10)

    def between(self, f):
        return f

    def forward(self, x):
        return self.classifier(self.between(self.features(x)))


class Masked(Plain):
    """A head whose argmax chooses a mask: FGAA in small."""

    def __init__(self) -> None:
        super().__init__()
        self.scores, self.select = nn.Linear(32, 10), Select()

    def between(self, f):
        return f * self.select(self.scores(f), self.scores.weight)


class Soft(Plain):
    """A head that weighs the features by its belief, wrapped twice; its softmax is a module too."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Sequential(nn.Sequential(nn.Linear(32, 10)), nn.Softmax(1))
        self.gate = nn.Linear(10, 32)

    def between(self, f):
        return f * torch.sigmoid(self.gate(self.aux(f)))


class Twice(Plain):
    """One auxiliary layer called twice, the second time in a tuple with something else; nothing uses it."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(32, 10)

        def forward(self, f):
            return self.inner(f), f

    def __init__(self) -> None:
        super().__init__()
        self.pair = Twice.Pair()

    def between(self, f):
        self.pair(f)
        self.pair(f * 0.5)
        return f


class Branches(Plain):
    """One branch is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList([nn.BatchNorm1d(32), nn.BatchNorm1d(32), nn.BatchNorm1d(32)])
        self.spare = nn.Parameter(torch.zeros(7))
        self.use = 0

    def between(self, f):
        return self.branches[self.use](f)


def found(model, surface=None, kind=None):
    torch.manual_seed(0)
    return [f for f in unread(model.eval(), surface or Surface(), X, 10) if kind in (None, f.kind)]


def test_a_plain_model_gives_nothing():
    assert found(Plain()) == []


@pytest.mark.parametrize("wrap", [nn.Sequential, lambda m: nn.Sequential(m, nn.BatchNorm1d(10), nn.Linear(10, 10))])
def test_layers_that_all_of_the_output_goes_through_are_no_hidden_heads(wrap):
    assert found(wrap(Plain())) == []


def test_a_hidden_head_is_named_and_a_declared_one_is_not():
    torch.manual_seed(0)
    model = Masked()
    head, selection = found(model)
    assert (head.kind, head.path, head.numbers, head.call) == ("head", "scores", 330, 0)
    assert (selection.kind, selection.path) == ("selection", "select")
    heads = {"scores": Head("scores")}
    assert [f.path for f in found(model, Surface(heads=heads))] == ["select"]
    assert found(model, Surface(heads=heads, selections={"m": Selection("select")})) == []
    assert [f.path for f in found(model, Surface(selections={"m": Selection("select")}))] == ["scores"]


def test_a_head_is_one_however_it_is_wrapped_and_so_is_what_is_made_of_it():
    torch.manual_seed(0)
    model = Soft()
    (head,) = found(model)
    assert head.path == "aux.0.0"
    for path in ("aux.0.0", "aux.0"):
        assert found(model, Surface(heads={"a": Head(path)})) == []


def test_calls_and_outputs_are_told_apart():
    torch.manual_seed(0)
    model = Twice()
    heads = [f for f in found(model) if f.kind == "head"]
    assert [(f.path, f.call) for f in heads] == [("pair.inner", 0), ("pair.inner", 1)]
    half = Surface(heads={"first": Head("pair", call=0, output=0)})
    assert [(f.path, f.call) for f in found(model, half)] == [("pair.inner", 1)]
    both = Surface(heads={"first": Head("pair.inner"), "second": Head("pair", call=1, output=0)})
    assert found(model, both) == []


class Again(Masked):
    """Runs itself twice, the second time on other features, and adds up the logits."""

    def forward(self, x):
        return super().forward(x) + super().forward(x.flip(3))


def test_a_network_that_runs_twice_shows_its_heads_once():
    torch.manual_seed(0)
    model = Again()
    assert [(f.path, f.call) for f in found(model, kind="head")] == [("scores", 0), ("scores", 1)]
    first = Surface(heads={"a": Head("scores")}, selections={"m": Selection("select", scores="a")})
    assert found(model, first) == []


@pytest.mark.parametrize(("name", "given"), [("fgaa_sat", {"index": "main"}), ("sap_sat", {"draws": 3})])
def test_built_in_defenses_that_run_twice_declare_all(name, given):
    spec, backbone = registry().get("defense", name).spec, registry().get("backbone", "cnn").spec
    info = DatasetInfo("digits", (1, 8, 8), 10, "cnn", tuple(backbone.slots))
    torch.manual_seed(0)
    body = load(backbone.build)(shape=info.shape, n_classes=10)
    model = load(spec.build)(body, info, **complete(name, spec.options, {})).eval()
    load(spec.apply)(model, **given)
    assert unread(model, load(spec.surface)(model), X, 10) == []


class Ensemble(nn.Module):
    """Two members, averaged: each is a classifier of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.members = nn.ModuleList([Plain(), Plain()])

    def forward(self, x):
        return self.members[0](x) + self.members[1](x)


def test_members_of_an_ensemble_are_heads():
    torch.manual_seed(0)
    assert [f.path for f in found(Ensemble())] == ["members.0.classifier", "members.1.classifier"]
    declared = Surface(heads={"a": Head("members.0"), "b": Head("members.1")})
    assert found(Ensemble(), declared) == []


def test_how_often_a_head_agrees_with_the_output_is_told():
    torch.manual_seed(0)
    model = Masked()
    with torch.no_grad():
        for layer in (model.scores, model.classifier):
            layer.weight.mul_(0.1)
            layer.bias.copy_(torch.arange(10.0))
    (head,) = found(model, kind="head")
    assert head.agrees == 1.0


def test_parameters_that_nothing_reads_are_named_by_module_and_left_as_they_were():
    torch.manual_seed(0)
    model = Branches()
    before = copy.deepcopy(model.state_dict())
    flags = [p.requires_grad for p in model.requires_grad_(False).parameters()]
    got = {f.path: f.numbers for f in found(model)}
    assert got == {"spare": 7, "branches.1": 64, "branches.2": 64}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("kind", ["parameter", "buffer"])
def test_a_knob_may_be_a_tensor(kind):
    """Its content is turned and put back, as an attack turns it; hidden scores are still found."""
    torch.manual_seed(0)
    model = Branches()
    scale = torch.ones(())
    if kind == "parameter":
        model.scale = nn.Parameter(scale)
    else:
        model.register_buffer("scale", scale)
    surface = Surface(knobs={"scale": Knob("", "scale", values=(2.0,))})
    assert {f.path for f in found(model, surface)} >= {"spare", "branches.1", "branches.2"}
    assert model.scale.item() == 1


def test_what_a_declared_knob_reaches_is_read():
    torch.manual_seed(0)
    model = Branches()
    surface = Surface(knobs={"use": Knob("", "use", "constant", (2,))})
    assert {f.path for f in found(model, surface)} == {"spare", "branches.1"}
    assert model.use == 0


def test_a_declared_gate_and_head_read_what_the_output_does_not():
    torch.manual_seed(0)
    model = Twice()
    assert "pair" in [f.path for f in found(model, kind="parameters")]
    assert found(model, Surface(heads={"a": Head("pair.inner")}), "parameters") == []
    assert found(model, Surface(gates={"a": Gate("pair.inner")}), "parameters") == []


class Dead(Plain):
    """Unit by unit dead, or behind a hard choice: no gradient, yet the output depends on it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.inner, self.how = nn.Linear(32, 32), how
        nn.init.constant_(self.inner.bias, -100.0)

    def between(self, f):
        z = self.inner(f)
        if self.how == "hard":
            return f * (1 + (z > -100).float())
        return f + (torch.relu(z) if self.how == "relu" else z.detach())


class DeadTwice(Dead):
    """A layer behind a dead one."""

    def __init__(self) -> None:
        super().__init__("relu")
        self.behind = nn.Linear(32, 32)

    def between(self, f):
        return f + self.behind(torch.relu(self.inner(f)))


def test_what_stands_behind_a_dead_layer_is_read():
    torch.manual_seed(0)
    assert found(DeadTwice()) == []


class Gated(Plain):
    """A gate that is stuck at 0 or 1 mixes two of many ways; the others are never used."""

    def __init__(self, stuck: float, ways: int = 40) -> None:
        super().__init__()
        self.ways = nn.ModuleList([nn.Linear(32, 32) for _ in range(ways)])
        self.gate = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 1), nn.Sigmoid())
        nn.init.constant_(self.gate[2].bias, stuck)

    def between(self, f):
        w = self.gate(f)
        return w * self.ways[0](f) + (1 - w) * self.ways[-1](f)


def test_knobs_under_which_nothing_else_is_used_cost_a_forward_each():
    torch.manual_seed(0)
    model, forwards = Branches(), []
    model.register_forward_pre_hook(lambda *_: forwards.append(len(_[1][0])))
    surface = Surface(knobs={"use": Knob("", "use", "constant", (0,) * 20)})
    assert {f.path for f in found(model, surface)} == {"spare", "branches.1", "branches.2"}
    assert len(forwards) <= 26
    assert max(forwards[1:]) <= 4


def test_what_a_knob_reaches_through_a_function_of_its_own_is_read():
    class Straight(torch.autograd.Function):
        @staticmethod
        def forward(ctx, weight, f):
            return f + (weight > 0).float()

        @staticmethod
        def backward(ctx, grad):
            return None, grad

    class Hidden(Branches):
        def __init__(self) -> None:
            super().__init__()
            self.hard = nn.Parameter(torch.randn(32))

        def between(self, f):
            f = super().between(f)
            return Straight.apply(self.hard, f) if self.use else f

    torch.manual_seed(0)
    surface = Surface(knobs={"use": Knob("", "use", "constant", (1,))})
    assert {f.path for f in found(Hidden(), surface)} == {"spare", "branches.2"}


@pytest.mark.parametrize("stuck", [0.0, 300.0, -300.0])
def test_a_gate_that_is_stuck_costs_few_forwards_and_hides_nothing(stuck):
    torch.manual_seed(0)
    model, forwards = Gated(stuck), []
    model.register_forward_pre_hook(lambda *_: forwards.append(1))
    assert {f.path for f in found(model)} == {f"ways.{k}" for k in range(1, 39)}
    assert len(forwards) <= 20


@pytest.mark.parametrize("how", ["relu", "detached", "hard"])
def test_no_gradient_is_not_unread(how):
    torch.manual_seed(0)
    assert found(Dead(how)) == []


def test_a_model_without_any_gradient_is_judged_by_what_moves():
    class NoGrad(Branches):
        def forward(self, x):
            with torch.no_grad():
                return super().forward(x)

    torch.manual_seed(0)
    assert {f.path for f in found(NoGrad())} == {"spare", "branches.1", "branches.2"}


def test_randomness_is_no_reading():
    class Noisy(Branches):
        def between(self, f):
            return super().between(f + 0.1 * torch.rand_like(f))

    torch.manual_seed(0)
    assert {f.path for f in found(Noisy(), Surface(random=True))} == {"spare", "branches.1", "branches.2"}


def flags(model, surface=None):
    return {i.name: i for i in check_defense(lambda: model, surface or Surface(), X, Y, 10)[1]}


def test_the_check_flags_hidden_heads_and_mentions_idle_parameters():
    torch.manual_seed(0)
    hidden = flags(Masked())["undeclared_parts"]
    assert (hidden.flag, hidden.fatal, hidden.value) == (True, False, 2)
    assert "'scores' gives learned scores of the classes and is no declared head" in hidden.evidence
    assert "'select' is a Select and no declared selection" in hidden.evidence
    assert "--surface" in hidden.remedy
    declared = Surface(heads={"a": Head("scores")}, selections={"m": Selection("select", scores="a")})
    assert not flags(Masked(), declared)["undeclared_parts"].flag
    idle = flags(Branches())
    assert not idle["undeclared_parts"].flag
    assert (idle["unread_parameters"].flag, idle["unread_parameters"].value) == (False, 135)
    assert "135 parameters change no logits and nothing that is declared" in idle["unread_parameters"].evidence
    assert flags(Plain())["unread_parameters"].evidence == ""


#: Parts of built-in defenses that serve training only; docs/defenses says so of each.
IDLE = {"afa": "norm.branches.", "pcl": ".far"}


@pytest.mark.parametrize("name", [r.name for r in registry().all("defense") if r.distribution == "adversarial-arena"])
def test_built_in_defenses_declare_all_they_learn(name):
    spec, backbone = registry().get("defense", name).spec, registry().get("backbone", "cnn").spec
    info = DatasetInfo("digits", (1, 8, 8), 10, "cnn", tuple(backbone.slots))
    torch.manual_seed(0)
    body = load(backbone.build)(shape=info.shape, n_classes=10)
    model = load(spec.build)(body, info, **complete(name, spec.options, {})).eval()
    with torch.no_grad():  # as after training: a denoising block starts as the identity
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape))
    surface = Surface() if spec.surface is None else load(spec.surface)(model)
    got = unread(model, surface, X, 10)
    assert [f for f in got if f.kind != "parameters"] == []
    assert all(IDLE.get(spec.module, "nothing") in f.path for f in got)
    assert bool(got) == (spec.module in IDLE)
