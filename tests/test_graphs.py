"""Recorded passes: they show what the passes show that they were made of, and none writes over another's answer.

Without a GPU the recorder is played by one that, like CUDA graphs, writes every answer to the same place.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from arena import graphs
from arena.attack import Query, Setup
from arena.contender import seeded
from arena.engine import run_iterated
from arena.graphs import KEPT, OFTEN, Graphs, record_passes
from arena.plugins import registry
from arena.question import Running
from arena.rng import Stream
from arena.search import Search
from arena.specs import load
from arena.surface import Gate, Head, Surface
from arena.surrogate import Surrogate
from arena.target import Target
from arena.tf32 import without_tf32
from arena.threat import Threat

X = torch.rand(48, 3, 12, 12, generator=torch.Generator().manual_seed(0))
Y = torch.arange(48) % 5
SURFACE = Surface(heads={"h": Head("head")}, gates={"g": Gate("gate")})
gpu = pytest.mark.gpu


class Net(nn.Module):
    """A convolution, a gate, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.gate = nn.Sequential(nn.Linear(8, 1), nn.Sigmoid(), nn.Flatten(0))
        self.head, self.last = nn.Linear(8, 5), nn.Linear(8, 5)

    def forward(self, x):
        h = self.norm(self.first(x)).relu().mean((2, 3))
        h = h * self.gate(h).view(-1, 1)
        return 20 * (self.last(h) + self.head(h).softmax(1))


def net(kind=Net):
    with seeded(3):
        return kind().eval().requires_grad_(False)


def target(kind=Net, precision="fp32", device="cpu"):
    return Target(net(kind).to(device), SURFACE, 5, 48, device=device, precision=precision)


class InPlace(torch.autograd.Function):
    """A replay: input, answers and gradient each have one place."""

    @staticmethod
    def forward(ctx, made, x):
        with torch.no_grad():
            made.x.copy_(x)
        with torch.enable_grad():
            made.parts = made.read(made.x)
        flat = [made.parts[0], *made.parts[1].values(), *made.parts[2].values()]
        if made.out is None:
            made.out, made.grad = [p.detach().clone() for p in flat], torch.zeros_like(x)
        for place, part in zip(made.out, flat, strict=True):
            place.copy_(part.detach())
        ctx.made = made
        return tuple(place.detach() for place in made.out)

    @staticmethod
    def backward(ctx, *grads):
        made = ctx.made
        flat = [made.parts[0], *made.parts[1].values(), *made.parts[2].values()]
        used = [(f, g) for f, g in zip(flat, grads, strict=True) if f.requires_grad]
        (grad,) = torch.autograd.grad([f for f, _ in used], made.x, [g for _, g in used])
        made.grad.copy_(grad)
        return None, made.grad.detach()


class Made:
    """A recorded pass."""

    def __init__(self, read, sample):
        self.read, self.x, self.out, self.grad = read, sample, None, None

    def __call__(self, x):
        logits, *rest = InPlace.apply(self, x)
        _, heads, gates = self.parts
        return logits, dict(zip(heads, rest, strict=False)), dict(zip(gates, rest[len(heads) :], strict=True))


@pytest.fixture
def recorder(monkeypatch):
    made = []

    def record(read, sample, allow_unused_input, pool):
        assert allow_unused_input
        assert pool == "pool"
        made.append((len(sample[0]), sample[0].requires_grad))
        return Made(read, sample[0])

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    return made


@pytest.mark.parametrize("grad", [False, True])
def test_answers_are_the_passes_own_and_stay(recorder, grad):
    plain, other = target(), target()
    other.graphs = Graphs(other.reader)
    weights = X.new_ones(32, 2)
    asked = [Query(X[k : k + 32].unsqueeze(1), "ce", weights, grad=grad) for k in (0, 8, 16)] * OFTEN
    found = [(plain.answer(q, Y[:32]), other.answer(q, Y[:32])) for q in asked]
    assert recorder == [(32, grad)]
    for one, two in found:  # compared when all have been made: none was written over
        for key in ("values", "logits", "errors", "scores") + (("grad",) if grad else ()):
            assert torch.equal(getattr(one, key), getattr(two, key)), key


def test_a_size_is_recorded_when_it_has_come_often_and_at_once_where_that_is_asked(recorder):
    made = target()
    made.graphs = Graphs(made.reader)
    for _ in range(OFTEN - 1):
        made.logits(X[:32])
    assert recorder == []
    made.logits(X[:32])
    assert recorder == [(32, False)]
    made.bare(X[:24])
    assert recorder == [(32, False), (24, False)]


def test_what_has_not_come_for_longest_makes_room(recorder, monkeypatch):
    monkeypatch.setattr(graphs, "KEPT", 2)
    assert KEPT > 2
    made = Graphs(target().reader)
    for size in (16, 24, 16, 32, 16, 24):  # 32 takes the place of 24, which then takes that of 32
        made.at_once(X[:size])
    assert recorder == [(16, False), (24, False), (32, False), (24, False)]


def test_where_memory_is_full_recorded_passes_give_theirs_back(recorder):
    made = target()
    made.graphs = Graphs(made.reader)
    made.bare(X[:32])
    made.shrink()
    made.bare(X[:32])
    assert recorder == [(32, False), (32, False)]


def test_surrogates_and_second_looks_are_not_recorded_ones(recorder):
    made = target()
    made.graphs = Graphs(made.reader)
    held = Query(X[:32].unsqueeze(1), surrogate=Surrogate(gates={"g": 1.0}))
    for _ in range(OFTEN + 1):
        made.answer(held, Y[:32])
        with made.in_fp32():
            made.logits(X[:32])
    assert recorder == []


def test_what_cannot_be_recorded_stays_and_is_said(monkeypatch):
    def record(*_, **__):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    made = target()
    expected = made.logits(X[:16])
    assert record_passes(made, X) == "RuntimeError: operation not permitted when stream is capturing"
    assert made.graphs is None
    assert torch.equal(made.logits(X[:16]), expected)


def test_replays_that_differ_are_not_taken(recorder, monkeypatch):
    def lying(_, x):
        nothing = x.new_zeros(len(x), 5) + 0 * x.sum()
        return nothing, {"h": nothing}, {"g": nothing[:, 0]}

    monkeypatch.setattr(Made, "__call__", lying)
    assert record_passes(target(), X).startswith("recorded passes differ from the eager ones by ")


# -- told before it is settled ------------------------------------------------------------------------------------


def attacked(made, name, **options):
    threat = Threat.parse("Linf", "16/255")
    spec = registry().get("attack", name).spec
    setup = Setup(threat, 5, Surface(), (3, 12, 12), Stream.of(0, name))
    x = X.to(made.device)
    with made.in_fp32():
        y = made.logits(x).argmax(1)
    return run_iterated(load(spec.iterate)(setup, **options), made, x, y, torch.arange(48).to(y.device))


SHORT = {
    "pgd": {"steps": 8},
    "apgd_t": {"steps": 6, "targets": 2},
    "fab_t": {"steps": 6, "targets": 2},
    "square": {"queries": 60},
}


@pytest.mark.parametrize(("name", "options"), [*SHORT.items(), ("staged", {}), ("square", {"queries": 1300})])
def test_an_attack_told_twice_finds_and_counts_the_same(name, options):
    with torch.no_grad():
        found = []
        for lazy in (False, True):
            made = target(precision="bf16")
            made.lazy = lazy
            found.append((attacked(made, name, **options), made.meter))
    (one, counted), (two, again) = found
    assert not one.error
    assert bool((one.again > 0).any())  # there was something to settle
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(two, field.name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name
    assert counted == again


# -- on a GPU ------------------------------------------------------------------------------------------------------


def searched(kind=Net, precision="fp32", **how):
    running = Running(device="cuda", precision=precision, **how)
    return Search(lambda: net(kind).to("cuda"), SURFACE, 5, X.to("cuda"), torch.ones(48, dtype=torch.bool), running)


class Looking(Net):
    """Looks at its numbers, which no graph can."""

    def forward(self, x):
        return super().forward(x) * (2.0 if float(x.detach().sum()) > 0 else 1.0)


#: How far a replay may lie from an eager pass, as a share of a row's length: bits were seen to differ on an H100.
ROUNDING = {"fp32": 1e-4, "bf16": 0.1}


@gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_real_graphs_show_what_eager_passes_show(precision):
    search = searched(precision=precision)
    made = search.target
    assert search.cheaper.recorded
    assert not search.cheaper.note
    x, y = X.to("cuda"), Y.to("cuda")
    for grad in (False, True):
        asked = [Query(x[k : k + 32].unsqueeze(1), "ce", x.new_ones(32, 2), grad=grad) for k in (0, 8, 16)] * OFTEN
        replayed = [made.answer(q, y[:32]) for q in asked]
        kept, made.graphs = made.graphs, None
        plain = [made.answer(q, y[:32]) for q in asked]
        made.graphs = kept
        for one, two in zip(plain, replayed, strict=True):  # compared when all have been made
            for key in ("logits", "grad") if grad else ("logits",):
                a, b = (getattr(seen, key).flatten(1) for seen in (one, two))
                assert float(((a - b).norm(dim=1) / a.norm(dim=1)).max()) < ROUNDING[precision], key


@gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("name", "options"), SHORT.items())
def test_what_an_attack_finds_on_a_gpu_is_one_to_the_eager_model(name, options, precision):
    search = searched(precision=precision)
    out = attacked(search.target, name, **options)
    assert not out.error
    assert search.target.graphs is not None
    assert not search.target.graphs.given_up
    found = out.early & out.attempted
    assert bool(found.any())
    with torch.no_grad(), without_tf32():
        eager = net().to("cuda")
        wrong = (eager(out.x_adv).argmax(1) != eager(X.to("cuda")).argmax(1)).cpu()
    assert bool(wrong[found].all())


@gpu
def test_a_model_that_looks_at_its_numbers_is_left_and_the_next_is_recorded():
    search = searched(Looking)
    assert not search.cheaper.recorded
    assert search.cheaper.note.startswith("not recorded: ")
    assert search.target.logits(X.to("cuda")).shape == (48, 5)
    assert searched().cheaper.recorded
