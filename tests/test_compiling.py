"""Compiled passes: what they show is what eager ones show; what cannot be compiled, or differs, is left and said."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from arena import compiling
from arena.attack import Query, Setup
from arena.cli.result import _passes as passes_line
from arena.compiling import Compiled, compile_passes
from arena.contender import seeded
from arena.engine import run_iterated
from arena.plugins import registry
from arena.question import Running
from arena.rng import Stream
from arena.search import Search
from arena.specs import load
from arena.surface import Gate, Head, Knob, Surface
from arena.surrogate import Surrogate
from arena.target import Target
from arena.threat import Threat

sys.path.insert(0, str(Path(__file__).parent / "packages" / "cheats"))
from asking import GO, ask

compiles = pytest.mark.skipif(shutil.which("g++") is None, reason="compiled passes on a CPU need a C++ compiler")
X = torch.rand(48, 3, 12, 12, generator=torch.Generator().manual_seed(0))
Y = torch.arange(48) % 5
SURFACE = Surface(
    heads={"h": Head("head")}, gates={"g": Gate("gate")}, knobs={"t": Knob("", "temperature", values=(1.0, 9.0))}
)


class Gated(nn.Module):
    """Two convolutions, a gate between them, a head, a temperature."""

    temperature = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.gate = nn.BatchNorm2d(8), nn.Sequential(nn.Linear(8, 1), nn.Sigmoid(), nn.Flatten(0))
        self.head, self.last = nn.Linear(8, 5), nn.Linear(8, 5)
        self.norm.running_mean.uniform_(-0.3, 0.3)
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        h = self.norm(self.first(x)).relu()
        weight = self.gate(h.mean((2, 3)))
        h = (self.second(h * weight.view(-1, 1, 1, 1)).relu() + h).mean((2, 3))
        return 20 * (self.last(h) + self.head(h).softmax(1)) / self.temperature


def lopsided(model=Gated) -> nn.Module:
    with seeded(0):
        return model().eval().requires_grad_(False)


def gated(model=Gated) -> nn.Module:
    made = lopsided(model)
    made.last.bias -= made(X).mean(0) / 20  # so that no class is far ahead of the others
    return made


def searched(build=gated, surface=SURFACE, x=X, precision="fp32", compile=True) -> Search:
    return Search(build, surface, 5, x, torch.ones(len(x)).bool(), Running("cpu", 32, precision, compile=compile))


@pytest.fixture(scope="module")
def pair() -> tuple[Target, Target]:
    """An eager search copy, and a compiled one."""
    return searched(compile=False).target, searched().target


@compiles
@pytest.mark.parametrize("grad", [False, True])
def test_compiled_passes_show_what_eager_ones_show(pair, grad):
    for n in (48, 40, 16, 3):
        weights, wanted = torch.ones(n, 2), Query(X[:n].unsqueeze(1), "ce", grad=grad)
        seen = [t.answer(dataclasses.replace(wanted, weights=weights), Y[:n]) for t in pair]
        for key in ("values", "logits", "scores", "grad"):
            a, b = (getattr(answer, key) for answer in seen)
            assert (a is None) == (b is None) == (key == "grad" and not grad)
            if a is not None:
                assert torch.allclose(a, b, atol=1e-5), key
        if grad:
            assert bool((seen[0].grad != 0).any())


@compiles
def test_an_attack_on_compiled_passes_finds_and_counts_the_same_whatever_the_batch(pair):
    made = []
    for target, batch in ((pair[0], 48), (pair[1], 48), (pair[1], 16), (pair[1], 24), (pair[1], 40)):
        target.batch_size = batch
        before = target.meter.forwards, target.meter.backwards
        for name, options in (("apgd_ce", {"steps": 15}), ("square", {"queries": 40})):
            threat = Threat.parse("Linf", "0.05")
            setup = Setup(threat, 5, SURFACE, (3, 12, 12), Stream.of(0, name))
            attack = load(registry().get("attack", name).spec.iterate)(setup, **options)
            found = run_iterated(attack, target, X, target.logits(X).argmax(1), torch.arange(48))
            made.append((target, found))
        assert target.meter.forwards > before[0]
        assert target.meter.backwards > before[1]
    found = [outcome for _, outcome in made]
    for eager, compiled, *others in (found[0::2], found[1::2]):
        assert torch.equal(eager.forwards, compiled.forwards)
        assert torch.equal(eager.attempted, compiled.attempted)
        assert bool((compiled.forwards < compiled.most).any())  # something was broken
        for small in others:
            assert torch.equal(compiled.x_adv, small.x_adv)
            assert torch.equal(compiled.forwards, small.forwards)


@compiles
def test_a_surrogate_is_not_read_by_code_that_was_compiled_without_it(pair):
    target = pair[1]
    held = [Surrogate(knobs={"t": 9.0}), Surrogate(gates={"g": 0.0})]
    plain, hot, shut = (
        target.answer(Query(X[:16].unsqueeze(1), "ce", grad=True, surrogate=mode), Y[:16]) for mode in (None, *held)
    )
    assert not torch.allclose(plain.values, hot.values, atol=1e-3)
    assert not torch.allclose(plain.grad, shut.grad, atol=1e-6)
    again = target.answer(Query(X[:16].unsqueeze(1), "ce", grad=True), Y[:16])
    assert torch.equal(again.values, plain.values)


class Planted(Compiled):
    """Passes that differ from the eager ones in what a subclass says."""

    def __init__(self, reader):
        self.reader, self.given_up = reader, ""

    def __call__(self, x):
        return self.spoil(self.reader(x), x)


class Lying(Planted):
    def spoil(self, seen, x):
        return dataclasses.replace(seen, logits=torch.zeros_like(seen.logits))


@compiles
def test_what_is_looked_at_in_fp32_is_eager(pair, monkeypatch):
    target = pair[1]
    with target.in_fp32():
        assert target.compiled is None
        eager = target.logits(X)
    assert torch.allclose(eager, target.logits(X), atol=1e-5)
    monkeypatch.setattr(target, "compiled", Lying(target.reader))
    assert not target.logits(X).any()  # so passes are the compiled ones, if nothing else is asked
    with target.in_fp32():
        assert torch.equal(target.logits(X), eager)


@compiles
def test_the_guard_sees_weights_change_that_compiled_code_has_packed():
    search = searched()
    assert search.cheaper.compiled
    assert search.guard.changed() == ""
    with torch.no_grad():
        search.target.model.second.weight[0] += 1e-3
    assert search.guard.changed() == "second.weight"
    search.renew()
    assert search.cheaper.compiled
    assert search.guard.changed() == ""


class Plain(Gated):
    """Without gate and head: their sums, in bf16, come out otherwise in a batch of another size."""

    def forward(self, x):
        return self.last(self.second(self.norm(self.first(x)).relu()).relu().mean((2, 3)))


@compiles
def test_bf16_is_compiled_in_bf16_and_a_mistake_is_looked_at_eagerly_in_fp32():
    search = searched(lambda: lopsided(Plain), Surface(), precision="bf16")
    target = search.target
    assert (search.cheaper.precision, search.cheaper.compiled) == ("bf16", True)
    seen = target.answer(Query(X[:16].unsqueeze(1), "margin"), target.logits(X[:16]).argmin(1))
    with target.in_fp32():
        exact = target.logits(X[:16])
    assert torch.equal(seen.logits[:, 0], exact)  # every row is a mistake, so fp32's word
    assert int(seen.again.sum()) == 16
    quiet = target.logits(X[:16])
    assert not torch.equal(quiet, exact)
    assert torch.allclose(quiet, exact, atol=0.2 * float(exact.max() - exact.min()))


# -- what is left as it is --------------------------------------------------------------------------------------


class Branching(Gated):
    """Looks at its input's values in Python, which no trace can."""

    def forward(self, x):
        return super().forward(x) * (2 if float(x.detach().sum()) > 0 else 1)


@compiles
def test_what_cannot_be_compiled_is_left():
    search = searched(lambda: gated(Branching))
    assert search.target.compiled is None
    assert not search.cheaper.compiled
    assert search.cheaper.note.startswith("not compiled: ")
    assert search.target.logits(X).shape == (48, 5)


def test_without_a_compiler_passes_stay_eager_and_the_record_says_why():
    """In a process of its own: torch keeps in mind which compiler it found."""
    code = "from test_compiling import searched; s = searched(); print(s.target.compiled, s.cheaper.note)"
    missing = {"CXX": "no-such-compiler", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env={**os.environ, **missing},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("None not compiled: InvalidCxxCompiler: No working C++ compiler found")
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("x", "surface", "why"),
    [
        (X[:, :, :8, :8], SURFACE, "pictures of up to 256 numbers"),
        (X, dataclasses.replace(SURFACE, random=True), "the model is random"),
    ],
)
def test_small_pictures_and_random_models_are_left(x, surface, why):
    search = searched(surface=surface, x=x)
    assert search.target.compiled is None
    assert why in search.cheaper.note


class OtherScores(Planted):
    def spoil(self, seen, x):
        return dataclasses.replace(seen, logits=seen.logits + torch.eye(5)[0] * 0.05)


class OtherGate(Planted):
    def spoil(self, seen, x):
        return dataclasses.replace(seen, gates={k: 1 - v for k, v in seen.gates.items()})


class StiffGate(Planted):
    def spoil(self, seen, x):
        return dataclasses.replace(seen, gates={k: v.detach() for k, v in seen.gates.items()})


class NoNumber(Planted):
    def spoil(self, seen, x):
        return dataclasses.replace(
            seen, logits=seen.logits + torch.where(x[:, :1, 0, 0] == X[3, 0, 0, 0], torch.nan, 0)
        )


class OneSlope(Planted):
    """A fifth of the rows have their gradient turned round."""

    def spoil(self, seen, x):
        turned = (torch.arange(len(x)) % 5 == 0).view(-1, 1)
        return dataclasses.replace(
            seen, logits=torch.where(turned, 2 * seen.logits.detach() - seen.logits, seen.logits)
        )


class AtSize(Planted):
    """Other last bits in batches of one size."""

    size = 40

    def spoil(self, seen, x):
        return dataclasses.replace(seen, logits=seen.logits * (1 + 1e-6 * (len(x) == self.size)))


class AtChosenSize(AtSize):
    size = 48


class OtherHeads(Planted):
    def spoil(self, seen, x):
        return dataclasses.replace(seen, heads={k: v * 1.01 for k, v in seen.heads.items()})


class Swapped(Planted):
    def spoil(self, seen, x):
        return dataclasses.replace(seen, logits=seen.logits.flip(1))


class OtherSlope(Planted):
    def spoil(self, seen, x):
        flat = (x - x.detach()).flatten(1).sum(1, keepdim=True)
        return dataclasses.replace(seen, logits=seen.logits + flat * torch.eye(5)[0])


class NoSlope(Planted):
    def spoil(self, seen, x):
        flat = seen.logits.detach() + 0 * seen.logits
        return dataclasses.replace(seen, logits=flat, heads={k: v.detach() for k, v in seen.heads.items()})


@pytest.mark.parametrize(
    ("planted", "precision", "why"),
    [
        (OtherScores, "fp32", "differ from the eager ones by"),  # in bf16 so small a difference is rounding
        (OtherHeads, "fp32", "differ from the eager ones by"),
        (OtherSlope, "fp32", "the compiled gradient differs"),
        (NoSlope, "fp32", "the compiled gradient differs"),
        (Swapped, "bf16", "differ from the eager ones by"),
        (NoSlope, "bf16", "the compiled gradient differs"),
        (OneSlope, "bf16", "the compiled gradient differs"),
        (NoNumber, "bf16", "are not finite"),
        (OtherGate, "fp32", "differ from the eager ones by"),
        (StiffGate, "fp32", "the compiled gradient differs"),
        (AtSize, "fp32", "a row other last bits in a batch of 40"),
    ],
)
def test_passes_that_differ_are_not_taken(monkeypatch, planted, precision, why):
    monkeypatch.setattr(compiling, "Compiled", planted)
    surface = dataclasses.replace(SURFACE, gates={}) if planted is AtSize else SURFACE  # batches of multiples of 8
    target = searched(lopsided, surface, precision=precision, compile=False).target
    assert why in compile_passes(target, X)
    assert target.compiled is None
    assert target.meter.forwards == target.meter.backwards == 0


def test_the_batch_size_that_is_chosen_is_proven_too(monkeypatch):
    monkeypatch.setattr(compiling, "Compiled", AtChosenSize)
    ungated = dataclasses.replace(SURFACE, gates={})  # its batches are multiples of 8
    search = Search(gated, ungated, 5, X, torch.ones(48).bool(), Running("cpu", 48, compile=True))
    assert search.target.batch_size == search.pace.batch_size == 48
    assert search.target.compiled is None
    assert search.cheaper.note == "not compiled: compiled passes give a row other last bits in a batch of 48"
    assert not search.cheaper.compiled


@compiles
def test_code_that_cannot_be_compiled_anew_on_the_way_goes_on_eagerly_and_is_told(monkeypatch):
    search = searched()
    target, expected = search.target, search.target.logits(X)

    def fail(x):
        raise torch._dynamo.exc.Unsupported("a trace of another kind")

    monkeypatch.setattr(target.compiled, "_forward", fail)
    assert torch.allclose(target.logits(X), expected, atol=1e-5)
    record = {"rosters": [], "provenance": {}}
    search.enter(record, 0)
    said = record["provenance"]["search"]
    assert not said["compiled"]
    assert said["note"].startswith("not compiled: given up on the way: Unsupported: a trace of another kind")


# -- in a match -------------------------------------------------------------------------------------------------


@compiles
def test_a_compiled_match_finds_the_same_is_a_question_of_its_own_and_says_so(registry, monkeypatch):
    monkeypatch.setattr(compiling, "SMALL_IMAGE", 63)  # digits have 64 numbers
    asked = {"vs": ("pgd", "square(queries=30)", "foolbox:LinfPGD(steps=3)"), "n": 48}
    eager, compiled = (ask(registry, running=dataclasses.replace(GO, compile=c), **asked).record for c in (False, True))
    searches = [r["provenance"]["search"] for r in (eager, compiled)]
    assert [s["compiled"] for s in searches] == [False, True], searches[1]["note"]
    assert eager["id"] != compiled["id"]
    for a, b in zip(eager["attacks"], compiled["attacks"], strict=True):
        kept = ("status", "attempted", "broken", "forwards", "backwards", "silent")
        assert {k: a[k] for k in kept} == {k: b[k] for k in kept}
    assert sum(a["broken"] for a in compiled["attacks"]) > 0
    assert ", compiled" in passes_line(compiled)
    assert "compiled" not in passes_line(eager)
