"""Records add up: shares, rosters, sweeps, worst case."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arena.lineup import Group, Planned
from arena.plugins import BUILT_IN, Registered
from arena.results import (
    Played,
    attack_row,
    packed,
    roster_row,
    share,
    sweep_rows,
    unique_breaks,
    unpacked,
    worst_case,
)
from arena.specs import AttackSpec


def planned(name: str, sweep: str = "", standalone: bool = False) -> Planned:
    spec = AttackSpec(name, "", ("Linf",), run="a:b", sweep=sweep, standalone=standalone)
    return Planned(name, Registered(spec, BUILT_IN, "1"), {})


def played(name: str, broken: list[int], n: int = 8, status: str = "ok", met=None, **spec) -> Played:
    mask = torch.zeros(n, dtype=torch.bool)
    mask[broken] = True
    met = torch.ones(n, dtype=torch.bool) if met is None else met
    return Played(planned(name, **spec), "vs", None, status, met, met.clone(), mask, met & ~mask, 10, 5, 1.0)


CORRECT = torch.tensor([True] * 7 + [False])


def test_a_share_is_of_all_points():
    value, (low, high) = share(CORRECT)
    assert value == 87.5
    assert 0 <= low < value < high <= 100


def test_an_attack_that_met_only_survivors_has_no_accuracy_of_its_own():
    met = CORRECT.clone()
    met[0] = False
    row = attack_row(played("a", [1], met=met), CORRECT)
    assert row["robust_accuracy"] is None
    assert row["ci95"] is None
    assert row["cumulative_accuracy"] == 62.5
    assert attack_row(played("a", [1], met=CORRECT.clone()), CORRECT)["robust_accuracy"] == 75.0


def test_the_worst_case_credits_the_first_attack_that_broke_a_point():
    worst, standing = worst_case([played("a", [0, 1]), played("b", [1, 2]), played("c", [])], CORRECT)
    assert worst["broken_by"] == {"a": 2, "b": 1}
    assert worst["robust_accuracy"] == 50.0
    assert standing.tolist() == [False, False, False, True, True, True, True, False]


@given(st.lists(st.sets(st.integers(0, 6)), min_size=1, max_size=5))
def test_worst_case_laws(breaks):
    rows = [played(f"a{i}", sorted(b)) for i, b in enumerate(breaks)]
    worst, standing = worst_case(rows, CORRECT)
    union = set().union(*breaks)
    assert sum(worst["broken_by"].values()) == len(union) == 7 - int(standing.sum())
    assert all(worst["robust_accuracy"] <= share(CORRECT & ~r.broken)[0] for r in rows)
    only = unique_breaks(rows)
    assert only == [sum(1 for p in b if sum(p in other for other in breaks) == 1) for b in breaks]


@pytest.mark.parametrize(
    ("rows", "complete"),
    [
        ([("a", "ok"), ("b", "ok")], True),
        ([("a", "ok"), ("b", "failed")], False),
        ([("a", "ok"), ("b", "partial")], False),
        ([("a", "ok")], False),
    ],
)
def test_a_roster_is_complete_only_if_every_member_played_and_worked(rows, complete):
    group = Group("roster", None, (planned("a"), planned("b")))
    made = [played(name, [0], status=status) for name, status in rows]
    assert roster_row(group, made, CORRECT)["complete"] is complete


def test_a_member_that_left_points_out_makes_its_roster_incomplete():
    group = Group("roster", None, (planned("a"),))
    row = played("a", [0])
    row.attempted[3] = False
    assert not roster_row(group, [row], CORRECT)["complete"]


def test_an_entry_in_which_nothing_worked_has_no_number():
    group = Group("x", None, (planned("x"),))
    assert roster_row(group, [played("x", [], status="unsupported")], CORRECT)["robust_accuracy"] is None


def test_a_sweep_counts_a_point_as_robust_only_if_no_row_breaks_it():
    rows = [played("l", [0], sweep="l"), played("l", [1, 2], sweep="l"), played("other", [3])]
    (row,) = sweep_rows(rows, CORRECT)
    assert row["name"] == "l"
    assert row["robust_accuracy"] == 50.0


def test_rows_that_did_not_work_have_no_number():
    failed = played("a", [], status="failed")
    assert attack_row(failed, CORRECT)["robust_accuracy"] is None
    assert worst_case([failed], CORRECT)[0]["robust_accuracy"] is None
    assert sweep_rows([played("l", [], sweep="l", status="unsupported")], CORRECT)[0]["robust_accuracy"] is None
    assert worst_case([failed, played("b", [])], CORRECT)[0]["robust_accuracy"] == 87.5


def test_an_attack_in_two_entries_is_one_attack():
    assert unique_breaks([played("a", [0, 1]), played("b", [1]), played("a", [0])]) == [1, 0, 1]


def test_a_roster_with_a_problem_is_not_complete():
    group = Group("roster", None, (planned("a"),), ("a plugin's hook failed",))
    assert not roster_row(group, [played("a", [0])], CORRECT)["complete"]


@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_points_survive_being_packed(mask):
    assert unpacked(packed(torch.tensor(mask)), len(mask)).tolist() == mask
