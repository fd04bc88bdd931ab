"""The batch size is chosen by timing, fits into memory, and decides nothing; bare costs are counted right."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from arena import pace
from arena.attack import Query
from arena.batches import out_of_memory, padded, piece
from arena.pace import SIZES, Pace, free_memory, measure, memory_of_a_row
from arena.surface import Knob, Surface
from arena.surrogate import Surrogate
from arena.target import DEFAULT_BATCH, Target


class Small(nn.Module):
    """A net on a device that holds ``room`` rows: what does not fit raises, and is not made smaller by itself."""

    def __init__(self, room: int = 10**9, error: Exception | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(256, 10)
        self.room, self.error, self.sizes, self.slope = room, error or MemoryError(), [], 1.0

    def forward(self, x):
        self.sizes.append(len(x))
        if len(x) > self.room:
            raise self.error
        return self.head(self.conv(x).relu().flatten(1)) * self.slope


OUT = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to allocate"
    ),
]
X = torch.rand(300, 1, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(300) % 10


@given(rows=st.integers(1, 2000), most=st.integers(2, 40).map(lambda k: 8 * k))
def test_rows_are_cut_into_as_few_batches_as_fit_and_hardly_any_is_padded(rows, most):
    sizes = []
    while sum(sizes) < rows:
        sizes.append(piece(rows - sum(sizes), most))
    assert sum(sizes) == rows
    assert len(sizes) == -(-rows // most)
    assert max(map(padded, sizes)) <= most
    assert all(size == padded(size) for size in sizes[:-1])
    assert max(sizes) - min(sizes) < max(most // 2, 3 * 8)


@pytest.mark.parametrize("error", OUT)
def test_a_full_memory_halves_the_batch_and_changes_no_answer(error):
    query = Query(X.unsqueeze(1), "ce", grad=True)
    expected = Target(Small(), Surface(), 10, 8).answer(query, Y)
    model = Small(room=40, error=error)
    target = Target(model, Surface(), 10, 256)
    answer = target.answer(query, Y)
    assert target.batch_size == 32
    assert model.sizes[:4] == [144, 96, 56, 24]  # of 300 rows, in batches of 256, 128, 64 and 32 at most
    assert max(model.sizes[3:]) == 32  # once is enough
    for name in ("values", "grad", "logits", "errors"):
        assert torch.equal(getattr(answer, name), getattr(expected, name))
    assert (target.meter.forwards, target.meter.backwards) == (300, 300)


def test_what_failed_halfway_is_counted_once():
    """The surrogate's pass fits, the model's own look after it does not."""

    class Heavier(Small):
        def forward(self, x):
            self.room = 10**9 if self.slope == 2.0 else 40
            return super().forward(x)

    surface = Surface(knobs={"slope": Knob("", "slope", "constant", (2.0,))})
    target = Target(Heavier(), surface, 10, 64)
    query = Query(X.unsqueeze(1), "ce", grad=True, surrogate=Surrogate(knobs={"slope": 2.0}), looks=2)
    target.answer(query, Y)
    assert target.batch_size == 32
    assert (target.meter.forwards, target.meter.backwards) == (900, 300)


def test_other_errors_and_a_memory_that_holds_nothing_are_passed_on():
    target = Target(Small(room=7, error=MemoryError()), Surface(), 10, 64)
    with pytest.raises(MemoryError):
        target.logits(X)
    assert target.batch_size == 16
    target = Target(Small(room=7, error=RuntimeError("planted")), Surface(), 10, 64)
    with pytest.raises(RuntimeError, match="planted"):
        target.logits(X)
    assert target.batch_size == 64
    assert not out_of_memory(RuntimeError("planted"))


@pytest.fixture
def timed(monkeypatch):
    """Costs by rule, seconds of a batch by (rows, with gradient), and a clock, ``plant.now``, that only passes move."""

    def plant(rule):
        def pass_by(work, _device):
            took = rule(len(work.args[1]), work.args[2])
            plant.now += took
            return took, took

        plant.now = 0.0
        monkeypatch.setattr(pace, "_seconds", pass_by)
        monkeypatch.setattr(pace.time, "perf_counter", lambda: plant.now)
        monkeypatch.setattr(pace, "OWN", 0.0)
        return Target(Small(), Surface(), 10)

    return plant


def test_the_best_size_has_the_most_rows_a_second_and_of_equals_is_the_largest(timed):
    costs = {8: 1.0, 32: 2.0, 64: 1.5, 128: 1.0, 256: 1.01, 304: 1.1}

    def rule(rows, grad):
        return rows * costs[rows] * (1e-7 if grad else 1e-8)

    target = timed(rule)
    found = measure(target, X)
    assert found.batch_size == target.batch_size == 256
    assert (found.forward, found.both) == pytest.approx((1.01e-8, 1.01e-7))
    costs[256] = 1.2
    assert measure(target, X).batch_size == 128
    costs[304] = 0.5
    assert measure(target, X).batch_size == 304  # all points in one batch


def test_what_the_engine_does_for_each_batch_counts(timed, monkeypatch):
    target = timed(lambda rows, grad: rows * (1e-5 if rows < 304 else 1.06e-5))
    assert measure(target, X).batch_size == 256
    monkeypatch.setattr(pace, "OWN", 1e-3)  # 13.9 and 13.9 microseconds a row
    assert measure(target, X).batch_size == 304


def test_no_time_is_spent_on_sizes_that_are_hopeless_or_too_slow(timed):
    asked = []

    def rule(rows, grad):
        asked.append(rows)
        return rows * (1e-7 if rows < 128 else 2e-7)

    assert measure(timed(rule), X).batch_size == 64
    assert set(asked) == {8, 32, 64, 128}
    asked.clear()
    slow = timed(lambda rows, grad: asked.append(rows) or rows * 0.1)  # 3 s a pass
    assert measure(slow, X).batch_size == 32
    assert set(asked) == {8}


def test_a_long_match_times_more_sizes(timed):
    asked = []

    def rule(rows, grad):
        asked.append(rows)
        return rows * 1e-3

    assert measure(timed(rule), X).batch_size == pace.UNTRIED
    assert set(asked) == {8, 32}
    asked.clear()
    assert measure(timed(rule), X, passes=(10**7, 10**7)).batch_size == 304  # hours: worth seconds
    assert set(asked) == {8, 32, 64, 128, 256, 304}
    asked.clear()
    hours = timed(lambda rows, grad: asked.append(rows) or rows * 0.1)  # 3 s a pass
    assert measure(hours, X, passes=(10**9, 10**9)).batch_size == 32
    assert set(asked) == {8}


def test_where_no_time_is_left_an_untried_size_fits_memory_and_goes_on_where_sizes_gained(timed, monkeypatch):
    slow = timed(lambda rows, grad: rows * 2e-3)  # a pair of 32 rows takes longer than all sizes may
    assert measure(slow, X).batch_size == pace.UNTRIED
    a_row = memory_of_a_row(slow, X[:8])
    monkeypatch.setattr(pace, "free_memory", lambda _device: a_row * 100 / pace.SHARE)
    assert measure(slow, X).batch_size == 96
    assert measure(slow, X[:70]).batch_size == 72  # all points in one batch
    monkeypatch.setattr(pace, "free_memory", lambda _device: a_row * 10 / pace.SHARE)
    assert measure(slow, X).batch_size == 32
    monkeypatch.setattr(pace, "memory_of_a_row", lambda _target, _x: 0.0)
    assert measure(slow, X).batch_size == pace.UNTRIED  # a model that keeps nothing for its backward
    monkeypatch.undo()
    costs = {8: 2e-4, 32: 2e-4, 64: 2.2e-4}
    assert measure(timed(lambda rows, grad: rows * costs[rows]), X).batch_size == 32  # 64 were no better


def test_in_a_long_match_what_was_disturbed_is_timed_again(timed):
    asked = []

    def rule(rows, grad):
        asked.append(rows)
        return rows * (1.15e-4 if rows > 128 and asked.count(rows) <= 2 * (1 + pace.PASSES) else 1e-4)

    assert measure(timed(rule), X, passes=(10**4, 10**4)).batch_size == 128  # two seconds, worth no time
    asked.clear()
    assert measure(timed(rule), X, passes=(10**8, 10**8)).batch_size == 304
    turns = 2 * (1 + pace.TURNS)
    assert [asked.count(size) for size in (32, 256, 304)] == [turns] * 3


def test_a_batch_takes_no_more_than_its_share_of_the_memory(monkeypatch, timed):
    a_row = memory_of_a_row(Target(Small(), Surface(), 10), X[:8])
    assert a_row == 4 * (64 + 4 * 64)  # the image and the map behind the activation, not the weights
    monkeypatch.setattr(pace, "free_memory", lambda _device: a_row * 100 / pace.SHARE)
    assert measure(timed(lambda rows, grad: rows**0.5), X).batch_size == 32  # a pass takes seconds
    assert measure(timed(lambda rows, grad: rows**0.5 * 1e-6), X).batch_size == 64
    assert free_memory("cpu") > 2**20


def test_a_size_that_was_asked_for_is_kept_unless_memory_is_full():
    target = Target(Small(), Surface(), 10)
    assert measure(target, X, 100).batch_size == target.batch_size == 104
    target = Target(Small(room=60), Surface(), 10)
    assert measure(target, X, 256).batch_size == target.batch_size == 32
    assert measure(target, X).batch_size == 32


def test_a_model_that_cannot_be_measured_costs_nothing_known():
    target = Target(Small(room=0, error=RuntimeError("planted")), Surface(), 10)
    assert measure(target, X) is None
    assert target.batch_size == DEFAULT_BATCH
    assert measure(target, X, 30) is None
    assert target.batch_size == 32


def test_nothing_is_counted_or_drawn():
    class Noisy(Small):
        def forward(self, x):
            return super().forward(x + torch.rand_like(x))

    target = Target(Noisy(), Surface(random=True), 10)
    state = torch.get_rng_state()
    found = measure(target, X)
    assert torch.equal(torch.get_rng_state(), state)
    assert min(found.forward, found.both) > 0
    assert (target.meter.forwards, target.meter.backwards) == (0, 0)


@pytest.mark.parametrize("a_row", [1e-6, 2e-5, 1e-4, 1e-3, 5e-3])
@pytest.mark.parametrize("size", [None, 256])
def test_all_sizes_take_a_fifth_of_a_second(timed, a_row, size):
    assert measure(timed(lambda rows, grad: a_row * rows), X, size) is not None
    assert timed.now < 0.3


def test_of_a_long_match_they_take_seconds_at_most(timed):
    assert measure(timed(lambda rows, grad: 1e-3 * rows), X, passes=(10**9, 10**9)) is not None
    assert 1.0 < timed.now < pace.TOO_LONG + 0.3


def test_bare_seconds_count_a_backward_with_its_forward():
    assert Pace(32, 1.0, 3.0).bare(10, 4) == 6 * 1.0 + 4 * 3.0
    assert tuple(sorted(SIZES)) == SIZES
