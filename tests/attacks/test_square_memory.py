"""Square passes over proposals whose answer is known: the same outcomes for fewer forwards."""

from dataclasses import replace

import pytest
import torch
from arena_attacks.square import Square, side
from arena_attacks.square_memory import AHEAD
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


def both(fight, model, **keywords):
    """Make the same fight twice: with memory, and asking for all."""
    asks = fight("square", model, **keywords)
    less = fight("square", model, **keywords)
    asks.attack.memory = None
    return less, asks


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.sampled_from([(1, 4, 4), (1, 5, 3), (1, 1, 6), (2, 2, 4), (3, 2, 2)]),
    eps=st.sampled_from(["0", "1/1000", "0.02", "0.3", "1"]),
    queries=st.sampled_from([32, 65, 180, 700]),
    p_init=st.sampled_from([0.8, 0.2]),
    restarts=st.sampled_from([1, 2]),
    low=st.sampled_from([0.0, 0.5]),
    high=st.sampled_from([0.5, 1.0]),
)
def test_passing_over_what_is_known_changes_no_outcome(fight, models, shape, eps, queries, p_init, restarts, low, high):
    kept = {"shape": shape, "eps": eps, "queries": queries, "p_init": p_init, "restarts": restarts}
    less, asks = both(fight, models.curved(shape, 3), low=low, high=high, n=9, **kept)
    assert less.attack.memory
    got, expected = less.run(), asks.run()
    assert not got.error, got.trace
    assert torch.equal(got.x_adv, expected.x_adv)
    assert torch.equal(got.attempted, expected.attempted)
    assert (got.forwards <= expected.forwards).all()


def test_most_of_a_long_search_on_a_small_image_is_known(fight, models):
    less, asks = both(fight, models.curved((1, 8, 8), 3), eps="1/10000", low=0.4, high=0.6, queries=3000)
    got, expected = less.run(), asks.run()
    assert (expected.forwards == 3001).all()
    assert (got.forwards < 900).all()
    assert torch.equal(got.x_adv, expected.x_adv)


@pytest.mark.parametrize("shape", [(1, 5, 5), (2, 3, 3)])
def test_no_proposal_is_asked_twice_of_the_same_point_and_none_changes_nothing(fight, models, shape):
    f = fight("square", models.curved(shape, 3), shape=shape, eps="1/10000", low=0.4, high=0.6, queries=2000)
    assert f.attack.memory
    asked, number = [{} for _ in f.y], 0
    watched = f.attack.ask

    def ask(state):
        nonlocal number
        for row, point, held, step in zip(
            state["index"].tolist(), state["point"], state["held"], state["step"].tolist(), strict=True
        ):
            assert step == 0 or not torch.equal(point, held)
            if side(step - 1, 0.8, *shape[1:]) > 1:  # two of them may make the same point
                continue
            before, key = asked[row - 100], (held.numpy().tobytes(), point.numpy().tobytes())
            before[key] = before.get(key, 0) + 1
            number += 1
        return watched(state)

    f.attack.ask = ask
    outcome = f.run()
    assert not outcome.error, outcome.trace
    assert number > 5 * len(f.y)
    assert all(times == 1 for before in asked for times in before.values())


def test_turns_lead_to_the_next_side(fight, models):
    memory = fight("square", models.curved((1, 8, 8), 3), queries=700).attack.memory
    sides = memory.sides.tolist()
    for query, turn in enumerate(memory.turns.tolist(), 1):
        assert len(set(sides[query - 1 : turn - 1])) == 1
        assert turn == 701 or sides[turn - 1] != sides[query - 1]


@pytest.mark.parametrize(
    ("case", "remembers"),
    [
        ({"queries": 5000}, True),
        ({"queries": 128}, True),
        ({"queries": 5000, "shape": (8, 4, 4)}, True),
        ({"queries": 127}, False),  # fewer queries than squares: hardly one would come again
        ({"queries": 5000, "shape": (3, 32, 32)}, False),
        ({"queries": 8192, "shape": (3, 32, 32)}, True),
        ({"queries": 5000, "shape": (40, 4, 4)}, False),
        ({"queries": 20000, "shape": (1, 96, 96)}, False),  # notes of so many squares would weigh too much
        ({"queries": 5000, "norm": "L2"}, False),
        ({"queries": 5000, "surface": "random"}, False),  # the same point answers otherwise the next time
    ],
)
def test_where_answers_are_remembered(fight, models, case, remembers):
    given_ = {"shape": (1, 8, 8), **case}
    if "surface" in given_:
        given_["surface"] = replace(models.headed, random=True)
    attack = fight("square", models.curved(given_["shape"], 3), **given_).attack
    assert isinstance(attack, Square)
    assert bool(attack.memory) == remembers


def test_bf16_that_lies_ends_no_row(fight, models, liar):
    f = fight("square", models.curved((1, 5, 5), 3), shape=(1, 5, 5), eps="1/1000000", queries=200)
    honest = f.run()
    assert f.attack.memory
    f.target = liar(f.target.model, f.target.surface, f.target.n_classes, 64, precision="bf16")
    outcome = f.run()
    assert not outcome.error, outcome.trace
    assert torch.equal(outcome.x_adv, honest.x_adv)
    assert torch.equal(outcome.forwards, honest.forwards)
    assert (outcome.again > 0).all()


def test_the_stretch_that_is_passed_over_may_be_longer_than_what_is_drawn(fight, models):
    """One pixel has two squares of a side, and one of them is idle: nothing is left to ask after one query."""
    less, asks = both(fight, models.curved((1, 1, 1), 3), shape=(1, 1, 1), eps="1/10000", queries=20 * AHEAD, n=5)
    got, expected = less.run(), asks.run()
    assert (got.forwards <= 4).all()
    assert (expected.forwards == 20 * AHEAD + 1).all()
    assert torch.equal(got.x_adv, expected.x_adv)


class Overflowing(torch.nn.Module):
    """Its margin is -inf at most points, though its logits are finite."""

    def forward(self, x):
        high = 3e38 * torch.ones(len(x))
        first = torch.where(x.flatten(1).sum(1) > 0.5, high, -high)
        return torch.stack((first, -first, -first), 1) * torch.where(x[:, 0, 0, 0] > 0.05, 1.0, 1e-38)[:, None]


def test_nothing_is_known_of_an_image_that_was_never_asked(fight):
    less, asks = both(fight, Overflowing(), shape=(1, 3, 3), eps="0.1", low=0.2, high=0.2, queries=200, n=16)
    got, expected = less.run(), asks.run()
    assert torch.equal(got.x_adv, expected.x_adv)
    assert (got.forwards < expected.forwards).any()


def test_rows_that_are_done_may_be_told_again(fight, models):
    f = fight("square", models.curved((1, 4, 4), 3), shape=(1, 4, 4), eps="1/10000", queries=40, n=5)
    assert f.attack.memory
    owned = {"x": f.x, "y": f.y, "index": f.index}
    state = {**f.attack.start(f.index, f.x, f.y, f.target.clean(f.x)), **owned}
    ends = {}
    for _ in range(400):
        state = {**f.attack.tell(state, f.target.answer(f.attack.ask(state), f.y)), **owned}
        for row in state["done"].nonzero().flatten().tolist():
            ends.setdefault(row, state["best"][row])
    assert torch.equal(torch.stack([ends[row] for row in range(5)]), f.run().x_adv)


def test_progress_counts_what_was_passed_over(fight, models, monkeypatch):
    monkeypatch.setattr("arena.engine.TELL_EVERY", 0.0)
    said = []
    f = fight("square", models.curved((1, 8, 8), 3), eps="1/10000", low=0.4, high=0.6, queries=3000, n=6)
    outcome = f.run(progress=lambda forwards, done: said.append((forwards, done)))
    shares = [forwards / (6 * 3001) for forwards, _ in said]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert max(share for share, (_, done) in zip(shares, said, strict=True) if not done) > 0.4
    assert (outcome.forwards < 0.3 * 3001).all()
