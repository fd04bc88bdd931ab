"""The search copy of a match: guarded also when it is folded, plain attacks work on it, second looks are bounded."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from torch import nn

import arena.playing
from arena.cheaper import make_cheaper
from arena.contender import seeded
from arena.guard import Guard
from arena.limit import Limit
from arena.match import play
from arena.pace import Pace
from arena.plugins import registry
from arena.question import Question, Running
from arena.search import Search
from arena.surface import Head, Surface
from arena.target import Target
from arena.watch import Silent

MODEL = """
import torch
from arena.datasets import digits, to_float

class Means(torch.nn.Module):
    def __init__(self):
        super().__init__()
        images = digits()
        x = to_float(images.x_train).flatten(1)
        means = torch.stack([x[images.y_train == k].mean(0) for k in range(10)])
        self.linear = torch.nn.Linear(64, 10)
        with torch.no_grad():
            self.linear.weight.copy_(2 * means)
            self.linear.bias.copy_(-means.square().sum(1))

    def forward(self, x):
        return self.linear(x.flatten(1))

def factory():
    return Means()
"""


class Wide(nn.Module):
    """A convolution with its norm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(4, 5)
        self.norm.running_mean.uniform_(-0.3, 0.3)
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


def wide() -> nn.Module:
    with seeded(0):
        return Wide().eval().requires_grad_(False)


X = torch.rand(24, 3, 16, 16, generator=torch.Generator().manual_seed(0))
SURFACE = Surface(heads={"h": Head("head")})


def opened(precision: str = "fp32", batch_size: int | None = None) -> Search:
    met = torch.arange(24) < 20
    return Search(wide, SURFACE, 5, X, met, Running("cpu", batch_size, precision))


def test_a_search_copy_is_folded_timed_and_as_large_as_what_attacks_can_meet():
    search = opened()
    assert (search.cheaper.folded, search.cheaper.channels_last) == (1, True)
    assert search.target.batch_size == search.pace.batch_size == 24  # 20 points, padded
    assert opened(batch_size=8).target.batch_size == 16
    assert (search.target.meter.forwards, search.target.meter.backwards) == (0, 0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_guard_sees_a_folded_copy_changed_and_a_fresh_one_is_no_other(precision):
    search = opened(precision)
    assert search.target.precision == precision
    assert search.guard.changed() == ""
    search.target.shrink()  # the memory was full: no change of the model
    assert search.guard.changed() == ""
    size, pace = search.target.batch_size, search.pace
    with torch.no_grad():
        search.target.model.conv.bias[0] += 1e-3
    assert search.guard.changed() == "conv.bias"
    search.renew()
    assert search.guard.changed() == ""
    assert (search.target.batch_size, search.pace) == (size, pace)
    search.target.model.conv.register_forward_hook(lambda _m, _i, out: out * 1.01)
    assert search.guard.changed() == "what it returns for the same images"


def test_the_guard_sees_what_the_folded_layer_was_given_instead_of_its_norm():
    model, done = make_cheaper(wide, SURFACE, X)
    assert done.folded == 1
    guard = Guard(Target(model, SURFACE, 5), X)
    model.norm = nn.BatchNorm2d(4).eval()
    assert guard.changed()


@pytest.mark.parametrize("n", [8, 5])
def test_plain_attacks_get_gradients_they_can_take_views_of(n):
    """A channels-last model's own gradients are laid out in another way."""
    target = opened().target
    eager = Target(wide(), SURFACE, 5)
    raw = X[:n].clone().requires_grad_(True)
    assert not torch.autograd.grad(target.model(raw).sum(), raw)[0].is_contiguous()
    for climb in (lambda t, x: t.module(x).logsumexp(1).sum(), lambda t, x: t.read(x).heads["h"].logsumexp(1).sum()):
        grads = []
        for one in (target, eager):
            x = X[:n].clone().requires_grad_(True)
            before = one.meter.backwards
            (grad,) = torch.autograd.grad(climb(one, x), x)
            assert one.meter.backwards - before == n
            grads.append(grad.view(n, -1))
        assert torch.allclose(*grads, atol=1e-6)
        assert bool((grads[1] != 0).any())


@pytest.mark.parametrize(("both", "live"), [(1e-4, 512), (0.05, 41), (10.0, 1)])
def test_so_many_rows_are_at_work_that_a_step_takes_seconds(monkeypatch, both, live):
    monkeypatch.setattr("arena.search.measure", lambda *_: Pace(32, both / 3, both))
    search = opened()
    assert search.target.live == live
    search.renew()
    assert search.target.live == live


# -- bf16's second looks ----------------------------------------------------------------------------------------


@pytest.fixture
def ask(tmp_path, arena_home):
    (tmp_path / "mine.py").write_text(MODEL)

    def answer(precision="bf16", limit=None, vs=("pgd(steps=6)", "square(queries=40)"), eps="0.05", **changes):
        question = Question(f"{tmp_path / 'mine.py'}:factory", vs, **{"n": 40, "eps": eps, **changes})
        running = Running("cpu", 16, precision, audit="none", time_limit=limit)
        return play(question, running, registry(), Silent())

    return answer


@pytest.fixture
def lying(monkeypatch, liar):
    """Searches in bf16 see a mistake at every point that stands."""
    return lambda: monkeypatch.setattr("arena.search.Target", liar)


def spent(record):
    return sum(r["forwards"] for r in record["attacks"]), sum(r["backwards"] for r in record["attacks"])


def test_points_looked_at_twice_stay_under_the_bound_and_reach_it(ask, lying):
    exact = ask("fp32", eps="1/100000").record
    lying()
    record = ask(eps="1/100000").record
    assert record["provenance"]["search"]["again"] == spent(exact)[0] > 0
    assert record["cost"] == {**exact["cost"], "forwards": 2 * spent(exact)[0], "backwards": spent(exact)[1]}
    assert spent(record) == (record["cost"]["forwards"], record["cost"]["backwards"])


def test_a_budget_is_the_same_in_both_precisions(ask):
    records = [ask(p, vs=("autoattack",), budget=400, n=8).record for p in ("fp32", "bf16")]
    line_ups = [[r["name"] for r in record["attacks"]] for record in records]
    assert line_ups[0] == line_ups[1] != []


def test_second_looks_are_counted_through_stops_as_in_one_go(ask, lying, monkeypatch, tmp_path):
    monkeypatch.setattr(arena.playing, "Limit", lambda s: Limit(s, partial(next, itertools.count())))
    lying()
    stopped = []
    while (answered := ask(limit=9)).record["stopped"]:
        stopped.append(answered.record)
        assert len(stopped) < 40
    for record in stopped:
        assert spent(record)[0] <= record["cost"]["forwards"]
        assert "partial" in {r["status"] for r in record["attacks"]}
    monkeypatch.setenv("ARENA_HOME", str(tmp_path / "another"))
    whole = ask().record
    drop = partial(map, lambda row: {k: v for k, v in row.items() if k != "seconds"})
    assert len(stopped) > 1
    assert [*drop(answered.record["attacks"])] == [*drop(whole["attacks"])]
    assert answered.record["worst_case"] == whole["worst_case"]
    assert answered.record["provenance"]["search"]["again"] == whole["provenance"]["search"]["again"] > 0
