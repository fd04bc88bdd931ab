"""Entries become attacks: rosters expand, foreign classes resolve, plugins add to ``adaptive``."""

from __future__ import annotations

import pytest

from arena.errors import ArenaError
from arena.lineup import check_entries, describe, line_up
from arena.plugins import registry
from arena.surface import Head, Surface
from arena.threat import Threat

LINF = Threat.parse("Linf", "0.1")


def test_entries_are_named_canonically_whatever_the_order_of_options():
    assert check_entries(("pgd(restarts=2,steps=7)",), registry()) == ("pgd(restarts=2,steps=7)",)
    assert check_entries(("pgd( steps = 7, restarts=2 )",), registry()) == ("pgd(restarts=2,steps=7)",)
    assert check_entries(("pgd(steps=20)",), registry()) == ("pgd",)  # a default adds nothing


def test_a_surface_decides_what_adaptive_holds():
    (plain,) = line_up(("adaptive",), registry(), Surface(), LINF, 10)
    (headed,) = line_up(("adaptive",), registry(), Surface(heads={"a": Head("x"), "b": Head("y")}), LINF, 10)
    names = [a.name for a in headed.attacks]
    assert not any("head=" in a.name for a in plain.attacks)
    assert {f"apgd_ce(head={h},steps=50)" for h in "ab"} <= set(names)
    assert "joint_t(steps=20,weights=first)" in names
    sweep = [a for a in headed.attacks if a.spec.spec.sweep]
    assert len(sweep) == 2 * (7 + 2)
    assert all(a.standalone for a in sweep)
    assert len(set(names)) == len(names)


def test_foreign_classes_resolve_and_misspelt_ones_name_the_nearest():
    ((one,), (two,)) = (
        g.attacks for g in line_up(("foolbox:LinfPGD(steps=3)", "art:SquareAttack"), registry(), Surface(), LINF, 10)
    )
    assert one.name == "foolbox:LinfPGD(steps=3)"
    assert one.options["cls"] == "LinfPGD"
    assert two.name == "art:SquareAttack"
    for text, said in (
        ("foolbox:LinfPDG", "LinfPGD"),
        ("art:SquareAtack", "SquareAttack"),
        ("torchattacks:PGD", "unknown library 'torchattacks'"),
        ("foolbox:zoo", "foolbox"),
    ):
        with pytest.raises(ArenaError, match=said) as caught:
            check_entries((text,), registry())
        assert "\n" not in str(caught.value)


def test_a_question_knows_versions():
    assert describe(("autoattack", "pgd"), registry())[0][0] == "autoattack"
    assert all(len(row) == 3 for row in describe(("autoattack", "adaptive", "pgd"), registry()))
    assert [describe((name,), registry())[0][2] for name in ("pgd", "staged")] == ["", "3"]
