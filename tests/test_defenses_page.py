"""docs/defenses.md is made, not typed: the page is complete and up to date, and picks results that can be compared."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from arena.leaderboard import Row, Standings
from arena.plugins import registry

sys.path.insert(0, str(Path(__file__).parent))
from loading import as_module

ROOT = Path(__file__).parent.parent
NAMES = {r.name for r in registry().all("defense") if r.distribution == "adversarial-arena"}


@pytest.fixture(scope="module")
def maker():
    return as_module(ROOT / "docs" / "make_defenses.py")


def row(defense, worst=50.0, date="2026-01-01", backbone="cnn", train_seed=0, trained_against=""):
    return Row(
        rank=(1, 1),
        defense=defense,
        backbone=backbone,
        train_seed=train_seed,
        trained_against=trained_against,
        natural=98.0,
        worst_case=worst,
        ci95=(worst - 5, worst + 5),
        autoattack=worst + 2,
        adaptive=worst + 1,
        verdict="clear",
        passes=1,
        date=date,
        result="r",
        model="m",
        reason="",
    )


def table(*rows, n=200, eps="0.2", norm="Linf"):
    return Standings("digits", "d", f"i{n}", norm, eps, n, rows, (row("mart"),), len(rows))


def cells(page):
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", page, re.M)
    assert len(rows) == len(dict(rows))
    return {name: [c.strip() for c in rest.split("|")] for name, rest in rows}


def test_without_results_all_are_listed_and_none_is_measured(maker):
    page = maker.page([])
    rows = cells(page)
    assert set(rows) == NAMES
    assert all(r[2:] == ["not measured", "", "", "", ""] for r in rows.values())
    assert rows["fgaa_sat"][:2] == [
        "2 heads, 2 selections",
        "natural 86.19, fgsm 60.84, pgd20 62.18, cw_linf 86.62, autoattack 62.68",
    ]
    assert rows["sap_sat"][0] == "3 knobs, random"
    assert "- published for `fd_sat`: CIFAR-10, ResNet-18, in FSR's paper" in page


def test_the_checked_in_page_is_what_the_specs_say(maker):
    """All but the measured columns; if this fails: python docs/make_defenses.py"""
    there, fresh = (ROOT / "docs" / "defenses.md").read_text(), maker.page([])
    assert {k: v[:2] for k, v in cells(there).items()} == {k: v[:2] for k, v in cells(fresh).items()}
    for pattern in (r"^## .*$", r"^- published for .*$"):
        assert re.findall(pattern, there, re.M) == re.findall(pattern, fresh, re.M)


def test_each_page_is_linked_once(maker):
    linked = re.findall(r"\]\(defenses/(\w+)\.md\)", maker.page([]))
    assert sorted(linked) == sorted(p.stem for p in (ROOT / "docs" / "defenses").glob("*.md"))


def test_measured_numbers_are_of_one_table_and_of_defenses_as_they_come(maker):
    page = maker.page(
        [
            table(row("sat"), row("fgaa_sat"), row("rt"), n=500, eps="0.1"),
            table(row("sat", 60.0), n=500),
            table(
                row("sat", 71.5),
                row("fgaa_sat", 66.0, date="2026-01-02"),
                row("fgaa_sat", 77.0),
                row("fgaa_sat(lam=1)"),
                row("ewas_sat", train_seed=1),
                row("cas_sat", backbone="resnet_small"),
                row("saa_sat", trained_against="Linf 0.1"),
                eps="1/5",
            ),
        ]
    )
    rows = cells(page)
    assert {name for name, r in rows.items() if r[2] != "not measured"} == {"sat", "fgaa_sat"}
    assert rows["sat"][2:] == ["98.0", "73.5", "72.5", "71.5 (66.5-76.5)", "clear"]
    assert rows["fgaa_sat"][5] == "66.0 (61.0-71.0)"
    assert "200 points" in page
    assert "(2026-01-01 to 2026-01-02)" in page


def test_at_a_tie_more_points_win(maker):
    page = maker.page([table(row("sat", 60.0), n=500), table(row("sat", 70.0), n=200)])
    assert "500 points" in page
    assert cells(page)["sat"][5].startswith("60.0")


def test_a_defense_on_no_page_is_named(maker, monkeypatch):
    monkeypatch.setattr(maker, "PAGES", {k: v for k, v in maker.PAGES.items() if k != "pcl"})
    with pytest.raises(SystemExit, match=r"pcl_rt, pcl_sat: on no page"):
        maker.page([])
