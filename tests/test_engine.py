"""The engine's laws: outcomes belong to points, not to batches; costs are exact; a crash is contained."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from arena import engine
from arena.attack import GateTerm, Query, Setup
from arena.auditing.observing import Observed
from arena.batches import pad, padded, piece
from arena.engine import run_iterated, run_plain
from arena.journal import Journal, joined
from arena.rng import Stream
from arena.surface import Gate, Surface
from arena.target import Target
from arena.threat import Threat

THREAT = Threat.parse("Linf", "0.03")
SETUP = Setup(THREAT, 10, Surface(), (1, 8, 8), Stream.of(0, "walk"))


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)
        ).eval()


class Walk:
    """Gradient steps from a random start; every row walks its own number of steps, so rows leave at different times."""

    def __init__(self, setup: Setup, steps: int = 12) -> None:
        self.setup, self.steps = setup, steps

    def start(self, index, x, y, clean):
        noise = self.setup.stream.uniform(index, 0, self.setup.shape) * 2 - 1
        point = self.setup.threat.project(x, x + noise * self.setup.threat.radius)
        return {
            "point": point,
            "step": torch.zeros_like(y),
            "last": index % self.steps + 1,
            "done": torch.zeros_like(y, dtype=torch.bool),
            "best": x,
        }

    def ask(self, state):
        return Query(state["point"].unsqueeze(1), "ce", grad=True)

    def tell(self, state, answer):
        broken = answer.logits[:, 0].argmax(1) != state["y"]
        step = state["step"] + 1
        moved = state["point"] + 0.01 * answer.grad[:, 0].sign()
        done = broken | (step > state["last"])
        point = self.setup.threat.project(state["x"], moved)
        return {"point": point, "step": step, "last": state["last"], "done": done, "best": state["point"]}

    def passes(self):
        return self.steps + 1, self.steps + 1


@pytest.fixture(scope="module")
def points():
    x = torch.rand(200, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    return x, net()(x).argmax(1).detach(), torch.arange(200) * 7 + 5


def walk(points, batch, attack=None, keeper=None, until=None, rows=slice(None)):
    x, y, index = points
    target = Target(net(), Surface(), 10, batch)
    return run_iterated(attack or Walk(SETUP), target, x[rows], y[rows], index[rows], None, keeper, None, until), target


@pytest.mark.parametrize("batch", [1, 7, 8, 24, 64, 500])
def test_outcomes_do_not_depend_on_the_batch_size(points, batch):
    expected, _ = walk(points, 200)
    got, _ = walk(points, batch)
    assert torch.equal(got.x_adv, expected.x_adv)
    assert torch.equal(got.forwards, expected.forwards)
    assert torch.equal(got.backwards, expected.backwards)


@settings(max_examples=15, deadline=None)
@given(st.permutations(list(range(40))), st.integers(1, 40))
def test_outcomes_do_not_depend_on_order_or_company(points, order, size):
    x, y, index = points
    expected, _ = walk(points, 64, rows=slice(0, 40))
    rows = torch.tensor(order[:size])
    target = Target(net(), Surface(), 10, 16)
    got = run_iterated(Walk(SETUP), target, x[rows], y[rows], index[rows])
    assert torch.equal(got.x_adv, expected.x_adv[rows])


def test_an_attack_that_needs_no_clean_scores_costs_no_pass_for_them(points):
    x, y, index = points
    spent = {}
    for needs, shape in ((True, (1, 10)), (False, (0, 0))):
        shapes, passes = [], []

        class Idle(Walk):
            needs_clean = needs

            def start(self, index, x, y, clean, shapes=shapes):
                shapes.append(tuple(clean.shape[1:]))
                return super().start(index, x, y, clean)

        model = net()
        model.register_forward_hook(lambda _m, _i, out, passes=passes: passes.append(len(out)))
        outcome = run_iterated(Observed(Idle(SETUP), SETUP.threat), Target(model, Surface(), 10, 200), x, y, index)
        assert set(shapes) == {shape}
        spent[needs] = sum(passes), int(outcome.forwards.sum())
    assert spent[True] == (spent[False][0] + 200, spent[False][1])


def test_more_rows_than_a_batch_are_at_work_unless_their_points_are_large(points, monkeypatch):
    seen = []

    class Watched(Walk):
        def ask(self, state):
            seen.append(len(state["point"]))
            return super().ask(state)

    expected, _ = walk(points, 200)
    for numbers, most in ((engine.NUMBERS, 200), (64 * 40, 40), (64, 16)):
        monkeypatch.setattr(engine, "NUMBERS", numbers)
        seen.clear()
        got, target = walk(points, 16, Watched(SETUP))
        assert max(seen) == most
        assert torch.equal(got.x_adv, expected.x_adv)
        assert target.meter.forwards == int(expected.forwards.sum())


def test_a_snapshot_of_before_second_looks_were_counted_goes_on(points, tmp_path):
    keeper = Journal(tmp_path).keeper("walk")
    walk(points, 64, keeper=keeper, until=lambda: True)
    path = tmp_path / "walk.state.npz"
    with np.load(path) as file:
        kept = {k: file[k] for k in file.files if not k.endswith(engine.AGAIN)}
        assert len(kept) == len(file.files) - 1
    np.savez(path, **kept)
    got, _ = walk(points, 64, keeper=Journal(tmp_path).keeper("walk"))
    assert not got.error, got.trace
    assert torch.equal(got.x_adv, walk(points, 64)[0].x_adv)


@pytest.mark.parametrize("other", ["another", "wider", "none"])
def test_a_snapshot_of_another_version_of_the_attack_costs_only_its_rows(points, tmp_path, other):
    calls, keeper = [], Journal(tmp_path).keeper("walk")
    walk(points, 64, keeper=keeper, until=lambda: calls.append(0) or len(calls) == 7)
    path = tmp_path / "walk.state.npz"
    with np.load(path) as file:
        kept = dict(file)
    name = next(k for k in kept if k.endswith("best"))
    best = kept.pop(name)
    if other == "another":
        kept[name + "2"] = best
    elif other == "wider":
        kept[name] = best[..., :1]
    np.savez(path, **kept)
    finished, _, _ = keeper.restore()
    assert 0 < len(finished) < len(points[1])
    got, target = walk(points, 64, keeper=Journal(tmp_path).keeper("walk"))
    assert not got.error, got.trace
    expected, _ = walk(points, 64)
    assert torch.equal(got.x_adv, expected.x_adv)
    assert target.meter.forwards == int(expected.forwards.sum()) - sum(row[1] for row in finished.values())


def test_an_attack_that_cannot_begin_where_a_snapshot_is_left_is_contained(points, tmp_path):
    class Exits(Walk):
        def start(self, index, x, y, clean):
            raise SystemExit(4)

    walk(points, 64, keeper=Journal(tmp_path).keeper("walk"), until=lambda: True)
    got, _ = walk(points, 64, Exits(SETUP), keeper=Journal(tmp_path).keeper("walk"))
    assert got.error == "SystemExit: 4"


def test_states_of_another_layout_are_not_joined():
    one = {"index": torch.arange(2), "known": torch.zeros(2, 64)}
    two = {"index": torch.arange(3), "known": torch.zeros(3, 128)}
    three = {"index": torch.arange(5)}
    assert len(joined([one, two, three, one])["index"]) == 4
    assert joined([]) is None


def test_costs_by_row_add_up_to_the_meter(points):
    got, target = walk(points, 32)
    clean = 0  # the pass over clean images is not counted
    assert int(got.forwards.sum()) + clean == target.meter.forwards
    assert int(got.backwards.sum()) == target.meter.backwards
    unbroken = (target.logits(got.x_adv).argmax(1) == points[1]).nonzero().squeeze(1)
    assert len(unbroken) > 10
    assert torch.equal(got.forwards[unbroken], (points[2] % 12 + 2)[unbroken])


def test_padding_is_to_multiples_of_eight_from_sixteen_on_and_not_counted():
    assert [padded(k) for k in (1, 8, 16, 17, 250)] == [16, 16, 16, 24, 256]
    assert pad(torch.zeros(3, 1, 2, 2)).shape[0] == 16
    target = Target(net(), Surface(), 10)
    target.logits(torch.rand(3, 1, 8, 8))
    assert (target.meter.forwards, target.meter.backwards) == (3, 0)


class GatedSums(nn.Module):
    """A sigmoid of one number a row weighs the scores."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(64, 1), nn.Sigmoid())
        self.last = nn.Linear(64, 10)

    def forward(self, x):
        flat = x.flatten(1)
        return self.last(flat) * (1 + self.gate(3 * flat - 1))


def test_rows_of_a_model_with_gates_do_not_depend_on_the_batch():
    """Vectors of 16 numbers, two at a time, have a rest in 24 numbers and none in 32."""
    torch.manual_seed(0)
    x = torch.rand(512, 1, 8, 8)
    target = Target(GatedSums(), Surface(gates={"g": Gate("gate")}), 10, batch_size=512)
    wanted = GateTerm(torch.ones(512, 1), torch.ones(512, 1))
    y = torch.zeros(512, dtype=torch.int64)
    whole = target.answer(Query(x.unsqueeze(1), "ce", grad=True, gates=wanted), y)
    for n in (1, 16, 24, 40, 56, 104, 200, 312):
        some = target.answer(Query(x[:n].unsqueeze(1), "ce", grad=True, gates=wanted.rows(torch.arange(n))), y[:n])
        for key in ("logits", "gates", "grad", "values"):
            assert torch.equal(getattr(some, key), getattr(whole, key)[:n]), (n, key)
    assert whole.gates.std() > 0.01
    assert [piece(n, 104, 32) for n in (350, 104, 33)] == [64, 104, 33]


def test_rows_that_want_no_gradient_cost_none(points):
    x, y, _ = points
    target = Target(net(), Surface(), 10)
    wants = torch.arange(len(y)) % 3 == 0
    mixed = target.answer(Query(x.unsqueeze(1), "ce", grad=wants), y)
    assert target.meter.backwards == int(wants.sum())
    assert target.meter.forwards == len(y)
    every = target.answer(Query(x.unsqueeze(1), "ce", grad=True), y)
    assert torch.equal(mixed.grad[wants], every.grad[wants])
    assert not mixed.grad[~wants].any()
    assert torch.equal(mixed.values, every.values)


def test_several_points_a_row(points):
    x, y, _ = points
    target = Target(net(), Surface(), 10, 16)
    many = torch.stack((x[:10], x[10:20], x[20:30]), dim=1)
    answer = target.answer(Query(many, "margin", grad=True), y[:10])
    assert answer.values.shape == (10, 3)
    alone = target.answer(Query(x[10:20].unsqueeze(1), "margin", grad=True), y[:10])
    assert torch.equal(answer.grad[:, 1], alone.grad[:, 0])
    assert torch.equal(answer.logits[:, 1], alone.logits[:, 0])


@pytest.mark.parametrize("wants", [True, False, "some"])
def test_points_of_a_row_may_aim_at_classes_of_their_own(points, wants):
    x, y, _ = points
    target = Target(net(), Surface(), 10, 16)
    many, aims = torch.stack((x[:10], x[10:20]), dim=1), torch.stack((y[10:20], y[20:30]), dim=1)
    some = torch.arange(10) % 3 == 0
    query = Query(many, "margin_targeted", targets=aims, grad=some if wants == "some" else wants)
    answer = target.answer(query, y[:10])
    for k in (0, 1):
        alone = Query(many[:, k : k + 1], "margin_targeted", target=aims[:, k], grad=query.grad)
        one = target.answer(alone, y[:10])
        assert torch.equal(answer.values[:, k], one.values[:, 0])
        assert (one.grad is None) == (answer.grad is None) == (wants is False)
        assert one.grad is None or torch.equal(answer.grad[:, k], one.grad[:, 0])


@pytest.mark.parametrize("stop", [1, 3, 8, 15])
def test_a_run_stopped_anywhere_goes_on_to_the_same_outcome(points, tmp_path, stop):
    expected, _ = walk(points, 32)
    journal = Journal(tmp_path / "j", every=0)  # a snapshot at every step
    journal.open("model")
    calls = []
    walk(points, 32, keeper=journal.keeper("a"), until=lambda: calls.append(0) or len(calls) >= stop)
    again = Journal(tmp_path / "j", every=0)
    assert again.open("model")
    got, target = walk(points, 32, keeper=again.keeper("a"))
    assert torch.equal(got.x_adv, expected.x_adv)
    assert torch.equal(got.forwards, expected.forwards)
    assert bool(got.attempted.all())
    assert got.moved
    assert target.meter.forwards < int(expected.forwards.sum())  # the first part was not repeated


def test_a_stop_between_rows_and_state_repeats_nothing_wrongly(points, tmp_path):
    """A row that finished after the snapshot stands in both files: the finished one wins."""
    expected, _ = walk(points, 32)
    journal = Journal(tmp_path / "j", every=0)
    journal.open("model")
    calls = []
    walk(points, 32, keeper=journal.keeper("a"), until=lambda: calls.append(0) or len(calls) >= 4)
    old = (tmp_path / "j" / "a.state.npz").read_bytes()
    walk(points, 32, keeper=journal.keeper("a"), until=lambda: calls.append(0) or len(calls) >= 9)
    (tmp_path / "j" / "a.state.npz").write_bytes(old)
    got, _ = walk(points, 64, keeper=journal.keeper("a"))
    assert torch.equal(got.x_adv, expected.x_adv)
    assert torch.equal(got.forwards, expected.forwards)


@pytest.mark.parametrize(
    "damaged",
    [
        lambda data: data[:100],
        lambda data: b"",
        lambda data: bytes(len(data)),
        lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2),
        lambda data: data[:300] + bytes([data[300] ^ 1]) + data[301:],
    ],
    ids=["cut", "empty", "zeros", "half", "a bit"],
)
def test_a_torn_journal_file_costs_only_its_rows(points, tmp_path, damaged):
    expected, _ = walk(points, 32)
    journal = Journal(tmp_path / "j", every=0)
    journal.open("model")
    calls = []
    walk(points, 32, keeper=journal.keeper("a"), until=lambda: calls.append(0) or len(calls) >= 9)
    for path in [*(tmp_path / "j").glob("a.rows-*"), tmp_path / "j" / "a.state.npz"]:
        path.write_bytes(damaged(path.read_bytes()))
    for path in (tmp_path / "j").glob("a.seconds-*"):
        path.write_bytes(b"")
    got, target = walk(points, 64, keeper=Journal(tmp_path / "j").keeper("a"))
    assert torch.equal(got.x_adv, expected.x_adv)
    assert target.meter.forwards == int(expected.forwards.sum())  # all attacked again


class Forgets(Walk):
    """Walks on from a break, and hands over its input."""

    def tell(self, state, answer):
        new = super().tell(state, answer)
        return {**new, "done": new["step"] > state["last"], "best": state["x"]}


@pytest.mark.parametrize("every", [1, 3])
def test_what_was_seen_of_a_row_survives_a_stop_and_other_batches(points, tmp_path, every):
    threat = Threat.parse("Linf", "0.3")
    watched = [Observed(Forgets(replace(SETUP, threat=threat)), threat, every) for _ in range(4)]
    expected, _ = walk(points, 32, watched[0])
    assert 3 <= int(expected.seen.sum()) < 200
    assert torch.equal(walk(points, 8, watched[1])[0].seen, expected.seen)
    journal = Journal(tmp_path / "j", every=0)
    journal.open("model")
    calls = []
    walk(points, 32, watched[2], journal.keeper("a"), until=lambda: calls.append(0) or len(calls) >= 20)
    got, _ = walk(points, 64, watched[3], Journal(tmp_path / "j").keeper("a"))
    assert torch.equal(got.seen, expected.seen)


def test_another_model_drops_the_journal(tmp_path):
    journal = Journal(tmp_path / "j")
    assert not journal.open("one")
    journal.mark("kept")
    assert journal.open("one")
    assert journal.marked("kept")
    assert not journal.open("two")
    assert not journal.marked("kept")


class Crash(Walk):
    def tell(self, state, answer):
        if bool((state["step"] >= 2).any()):
            raise RuntimeError("planted")
        return super().tell(state, answer)


def test_a_crash_is_named_and_finished_rows_are_kept(points):
    got, _ = walk(points, 32, Crash(SETUP))
    assert got.error == "RuntimeError: planted"
    assert "planted" in got.trace
    assert 0 < int(got.attempted.sum()) < 200
    assert torch.equal(got.x_adv[~got.attempted], points[0][~got.attempted])


class Reshapes(Walk):
    def tell(self, state, answer):
        return {**super().tell(state, answer), "best": state["x"][:, :, :4]}


def test_a_best_point_of_the_wrong_shape_is_named(points):
    got, _ = walk(points, 32, Reshapes(SETUP))
    assert "state['best'] is torch.float32 (1, 4, 8), expected float (1, 8, 8)" in got.error


def test_plain_functions_draw_the_same_numbers_however_often_they_run(points):
    x, y, index = points

    def noisy(target, x, y, threat, budget, rng):
        return threat.project(x, x + threat.radius * torch.randn_like(x))

    def play():
        target = Target(net(), Surface(), 10)
        return run_plain(noisy, target, x, y, index, THREAT, Stream.of(1, "noisy"), {})

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = play()
    assert torch.equal(torch.get_rng_state(), before)  # the caller's generator is left alone
    torch.manual_seed(2)
    assert torch.equal(play().x_adv, first.x_adv)


def test_a_wrapped_module_counts_rows_and_gradients(points):
    x, y, index = points

    def one_step(target, x, y, threat, budget, rng):
        leaf = x.clone().requires_grad_(True)
        loss = nn.functional.cross_entropy(target.module(leaf), y, reduction="sum")
        (grad,) = torch.autograd.grad(loss, leaf)
        return threat.project(x, x + threat.radius * grad.sign())

    target = Target(net(), Surface(), 10)
    got = run_plain(one_step, target, x, y, index, THREAT, Stream.of(1, "one"), {})
    assert (int(got.forwards.sum()), int(got.backwards.sum())) == (200, 200)
    assert got.moved
