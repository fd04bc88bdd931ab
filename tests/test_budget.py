"""A roster stays within its passes an example, names what it leaves out, and a cut by the user is never hidden."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arena.attack import Setup
from arena.budget import Prices, within
from arena.errors import ArenaError
from arena.lineup import Group, line_up
from arena.match import play
from arena.plugins import registry
from arena.question import Question, Running
from arena.rng import Stream
from arena.surface import Head, Surface
from arena.threat import Threat
from arena.watch import Silent

LINF = Threat.parse("Linf", "0.1")
HEADED = Surface(heads={"a": Head("x"), "b": Head("y")})


def roster(name: str = "adaptive", surface: Surface = HEADED) -> Group:
    return line_up((name,), registry(), surface, LINF, 10)[0]


def costs(surface: Surface = HEADED, draws: int = 1):
    setup = Setup(LINF, 10, surface, (1, 8, 8), Stream.of(0, "test"), lambda name: None)
    return Prices(lambda planned: setup, draws).cost


@given(st.integers(1, 12_000))
def test_what_is_played_fits_and_nothing_is_lost(budget):
    group, price = roster(), costs()
    made = within(group, budget, price)
    assert sum(price(a) for a in made.attacks) <= budget
    names = [a.name for a in group.attacks]
    assert sorted([a.name for a in made.attacks] + [one.name for one in made.left_out]) == sorted(names)
    assert [a.name for a in made.attacks] == [n for n in names if n in {a.name for a in made.attacks}]  # in its order
    spare = budget - sum(price(a) for a in made.attacks)
    assert all(one.passes > spare for one in made.left_out)  # nothing is left out that has room
    assert made.cut == bool(made.left_out)  # the default budget holds this roster whole


def test_the_cost_is_what_a_point_that_stands_costs():
    by_name = {a.name: a for a in roster().attacks}
    assert costs()(by_name["apgd_ce(steps=20)"]) == 21 + 21
    assert costs(draws=20)(by_name["apgd_ce(steps=20)"]) == 20 * (21 + 21)
    assert costs()(by_name["joint_t(steps=20)"]) == 9 * 21 * 2


def test_every_built_in_surface_fits_into_the_default_budget():
    many = Surface(heads={f"h{k}": Head(str(k)) for k in range(4)})
    assert not within(roster(surface=many), None, costs(many)).left_out


def test_a_single_attack_and_a_roster_without_a_budget_are_never_cut():
    single = line_up(("apgd_t",), registry(), Surface(), LINF, 10)[0]
    assert within(single, 1, costs()) == single
    whole = roster("autoattack", Surface())
    assert within(whole, None, costs()) == whole


def test_a_cut_is_told_costs_no_more_and_leaves_the_roster_incomplete():
    question = Question("rt", ("adaptive",), n=24, eps="0.02", budget=500)
    record = play(question, Running(device="cpu", audit="none"), registry(), Silent()).record
    (row,) = record["rosters"]
    assert not row["complete"]
    assert row["cut"]
    assert row["budget"] == 500
    assert row["forwards"] + row["backwards"] <= 24 * 500
    assert row["members"] == ["apgd_ce(steps=20)", "apgd_t(steps=20)"]
    assert row["left_out"]["pgd(loss=margin,restarts=5,steps=40)"] == 405
    (flag,) = [i for i in record["audit"]["indicators"] if i["name"] == "roster_incomplete"]
    assert flag["flag"]
    assert "500 passes" in flag["evidence"]
    assert "--budget" not in flag["remedy"]
    whole = play(
        Question("rt", ("adaptive",), n=24, eps="0.02"), Running(device="cpu", audit="none"), registry(), Silent()
    ).record
    assert whole["id"] != record["id"]
    assert whole["rosters"][0]["complete"]
    assert not whole["rosters"][0]["left_out"]


@pytest.mark.parametrize("budget", [0, -3])
def test_a_budget_of_nothing_is_refused(budget):
    with pytest.raises(ArenaError, match=f"--budget {budget}: expected at least 1"):
        play(Question("rt", ("adaptive",), budget=budget), Running(device="cpu"), registry(), Silent())
