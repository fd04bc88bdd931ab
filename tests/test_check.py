"""The defense check: each broken rule is named; honest models pass."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from arena.check import came_again, check_defense, drift
from arena.errors import ArenaError
from arena.surface import Head, Knob, Surface

sys.path.insert(0, str(Path(__file__).parent / "packages" / "cheats"))
import arena_cheats

X = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(40) % 10


def flags(build, surface=None):
    return {i.name: i for i in check_defense(build, surface or Surface(), X, Y, 10)[1] if i.flag}


def test_scores_come_again_exactly_on_the_cpu_and_up_to_rounding_elsewhere():
    before = torch.tensor([[[0.0, 2.0, 10.0], [5.0, 1.0, 0.0]]])
    rounded, other = before.clone(), before.clone()
    rounded[0, 1, 0] += 1e-5
    other[0, 1, 0] += 1e-3
    assert came_again(before.clone(), before, drift("cpu"))
    assert not came_again(rounded, before, drift("cpu"))
    assert came_again(rounded, before, drift("cuda:0"))
    assert not came_again(other, before, drift("cuda:0"))
    assert not came_again(before * torch.nan, before, drift("cuda:0"))


def test_an_honest_model_passes():
    assert flags(arena_cheats.honest) == {}


@pytest.mark.parametrize(
    ("factory", "name", "fatal"),
    [
        ("undeclared_randomness", "undeclared_randomness", True),
        ("depends_on_neighbours", "depends_on_neighbours", True),
        ("changes_when_called", "defense_changes", True),
        ("probabilities", "probabilities", False),
        ("no_gradient", "no_gradient", False),
    ],
)
def test_each_cheat_is_named(factory, name, fatal):
    found = flags(getattr(arena_cheats, factory))
    assert name in found
    assert found[name].fatal is fatal
    assert found[name].evidence
    assert found[name].remedy


def test_declared_randomness_is_no_flag():
    found = flags(arena_cheats.undeclared_randomness, Surface(random=True))
    assert not {"undeclared_randomness", "idle_randomness"} & set(found)


def test_randomness_that_is_declared_and_not_there_is_a_flag():
    found = flags(arena_cheats.Base, Surface(random=True))["idle_randomness"]
    assert not found.fatal
    assert found.evidence == "declared random, but the same images gave the same logits 7 times"
    assert "idle_randomness" not in flags(arena_cheats.Base)


def test_batch_statistics_at_test_time_are_found():
    class BatchStatistics(arena_cheats.Base):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(1, track_running_stats=False)

        def forward(self, x):
            return self.scores(self.norm(x))

    assert "depends_on_neighbours" in flags(BatchStatistics)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (lambda x: x, r"returns torch.float32 \(32, 1, 8, 8\), expected float logits \(N, 10\)"),
        (lambda x: (x,), "returns tuple, expected float logits"),
        (lambda x: x.flatten(1)[:, :4], "returns 4 logits, the data set has 10 classes"),
        (lambda x: x.flatten(1) @ torch.ones(3, 3), r"cannot be called on images \(1, 8, 8\): RuntimeError"),
    ],
)
def test_a_model_that_is_no_classifier_is_refused_in_one_line(out, message):
    class Odd(nn.Module):
        def forward(self, x):
            return out(x)

    with pytest.raises(ArenaError, match=message) as caught:
        check_defense(Odd, Surface(), X, Y, 10)
    assert "\n" not in str(caught.value)


def test_last_bits_that_depend_on_the_place_in_the_batch_are_said_but_no_flag():
    """On CPUs where the linear algebra library works so; elsewhere the finding is simply empty."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Linear(64, 7)
            self.last = nn.Linear(7, 10)

        def forward(self, x):
            return self.last(torch.tanh(self.mix(x.flatten(1))))

    model = Odd()
    found = {i.name: i for i in check_defense(lambda: model, Surface(), X, Y, 10)[1]}["depends_on_place"]
    with torch.no_grad():
        same = bool(model(X[:32].flip(0)).flip(0).eq(model(X[:32])).all())
    assert not found.flag
    assert bool(found.evidence) is not same


def test_a_surface_that_does_not_fit_is_refused():
    with pytest.raises(ArenaError, match="no module 'linaer'; did you mean 'linear'"):
        check_defense(arena_cheats.honest, Surface(heads={"a": Head("linaer")}), X, Y, 10)


def test_a_head_that_never_fires_is_refused():
    class Idle(arena_cheats.Base):
        def __init__(self):
            super().__init__()
            self.idle = nn.Linear(64, 10)

    with pytest.raises(ArenaError, match=r"head 'a' at 'idle' .* never fired"):
        check_defense(Idle, Surface(heads={"a": Head("idle")}), X, Y, 10)


def test_logits_that_are_not_finite_void_the_match():
    class Nan(arena_cheats.Base):
        def forward(self, x):
            return self.scores(x) * float("nan")

    found = flags(Nan)
    assert found["nonfinite_logits"].fatal
    assert all(v == v for i in found.values() for v in i.record().values())


def test_a_knob_that_is_not_there_is_refused():
    surface = Surface(knobs={"t": Knob("linear", "tau")})
    with pytest.raises(ArenaError, match="knob 't': 'linear' has no attribute 'tau'"):
        check_defense(arena_cheats.honest, surface, X, Y, 10)


def test_the_width_of_the_logits_is_told():
    assert check_defense(arena_cheats.honest, Surface(), X, Y % 3, 3)[0] == 10


def test_a_readout_must_give_the_models_own_logits():
    check_defense(arena_cheats.Base, Surface(readout=lambda model, x: {"logits": model(x)}), X, Y, 10)
    with pytest.raises(ArenaError, match="surface: readout gives other logits than the model does, by"):
        check_defense(arena_cheats.Base, Surface(readout=lambda model, x: {"logits": model(1 - x)}), X, Y, 10)
    with pytest.raises(ArenaError, match=r"surface: readout gives logits \(32, 3\), the model \(32, 10\)"):
        check_defense(arena_cheats.Base, Surface(readout=lambda model, x: {"logits": model(x)[:, :3]}), X, Y, 10)


def test_a_model_that_cannot_be_searched_for_hidden_parts_is_a_doubt():
    """Who makes the search fail gets no clean sheet."""

    class Shy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

        def forward(self, x):
            if self.inner._forward_hooks or self.inner[1]._forward_hooks:
                raise RuntimeError("no hooks here")
            return self.inner(x)

    def make() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return Shy().eval()

    found = flags(make)
    assert set(found) == {"undeclared_parts"}
    assert not found["undeclared_parts"].fatal
    assert found["undeclared_parts"].evidence == "not checked: RuntimeError: no hooks here"
