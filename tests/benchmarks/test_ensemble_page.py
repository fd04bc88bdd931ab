"""The ensembles' benchmark: tables and the page, of made-up cells."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parent))
from ensemble import measuring, page, tables
from ensemble.frontier import frontier, spots
from made_up import SETTINGS, cell
from pairing import discordant


def run(way, case="cnn", seed=0, pair=0, threads=1, **fields):
    return measuring.Run(case, seed, way, threads, pair, cell(**fields))


RUNS = [
    run("quick", broken=(0, 1, 2), forwards=8, backwards=4, seconds=0.5),
    run("autoattack", broken=(0, 1, 3), forwards=80, backwards=40, seconds=2.0),
    run("autoattack, plain", broken=(0, 1, 3), forwards=400, backwards=44, seconds=6.0),
    run("reference", broken=(0, 1), forwards=480, backwards=48, seconds=9.0),
    run("quick", pair=1, broken=(0, 1, 2), forwards=8, backwards=4, seconds=1.0),
    run("autoattack", pair=1, broken=(0, 1, 3), forwards=80, backwards=40, seconds=3.0),
    run("autoattack, plain", pair=1, broken=(0, 1, 3), forwards=400, backwards=44, seconds=6.0),
    run("quick", seed=1, broken=(), forwards=8, backwards=4, seconds=0.5, wrong=(7,)),
    run("autoattack", seed=1, broken=(3,), forwards=80, backwards=40, seconds=2.0, wrong=(7,)),
    run("autoattack, plain", seed=1, broken=(3,), forwards=400, backwards=44, seconds=6.0, wrong=(7,)),
]
ATTACK_ROWS = (("apgd_ce", 16, 16, 1.0), ("square", 64, 0, 3.0))
WAYS = page.Ways("quick", "autoattack")


def test_two_ways_are_compared_point_by_point():
    word = tables.compare(tables.couples(RUNS, "quick", "autoattack"))
    # only quick: point 2 at seed 0; only autoattack: point 3 at both seeds, one image
    assert (word.only_a, word.only_b, word.p) == (1, 2, 1.0)
    assert word.gap == pytest.approx(100 * (5 + 7 - 5 - 6) / 16)
    assert tables.compare(tables.couples(RUNS, "quick", "nothing")) is None
    rows = tables.outcomes(RUNS, "quick", "autoattack").rows
    assert rows[1] == ["`cnn`", "75.0 (62.5-87.5)", "68.8 (62.5-75.0)", "+6.25", "1", "2", "1.000"]
    assert rows[-1][0] == "**pooled**"


def test_counts_are_summed_and_seconds_are_medians_over_pairs():
    assert tables.ratio(RUNS, "autoattack, plain", "quick", "forwards") == 50
    assert tables.ratio(RUNS, "autoattack", "quick", "backwards") == 10
    # pair 0 holds both seeds, 12 s to 1 s; pair 1 only the first, 6 s to 1 s
    assert tables.ratio(RUNS, "autoattack, plain", "quick", "seconds") == pytest.approx((12 + 6) / 2)
    assert tables.ratio(RUNS, "reference", "quick", "backwards") == 12  # only where both are known
    assert tables.ratio(RUNS, "nothing", "quick", "seconds") is None


def test_the_page_says_what_holds(tmp_path):
    settings = measuring.Settings(**{**SETTINGS, "fast": "quick", "frontier": ()})
    members = [run("square, arena", broken=(1,)), run("square, torchattacks", broken=(1, 2))]
    overhead = [run("pgd, arena", seconds=3.0), run("pgd, art", seconds=3.0)]
    found = measuring.Found(RUNS, members, overhead, {"torchattacks": "offline"})
    out = tmp_path / "ensemble.md"
    text = page.write(out, found, settings, WAYS, "python benchmarks/ensemble.py", ["art 1"])
    assert out.read_text() == text
    assert (tmp_path / "figures" / "ensemble.svg").read_bytes().startswith(b"<?xml")
    held = {row.split("|")[1].strip(): row.split("|")[4].strip() for row in text.splitlines() if row.startswith("| ")}
    assert held["`quick` not above `autoattack`, pooled, points"] == "**no**"
    assert held["forwards, the plain run over `quick`"] == "**yes**"
    assert held["seconds, the plain run over `quick`"] == "**no**"
    assert held["points on which `autoattack` and the plain run differ"] == "**yes**"
    assert held["`pgd` over its bare passes, `cifar`"] == "-"  # no number is made up

    assert "| `square` | `cnn` | 87.5 | 75.0 | +12.50 | 0 | 1 | 1.000 | 10 + 5 | 10 + 5 | 0 |" in text
    assert "| `cnn` | pgd, art | 8 | 1 | 8 | 10 + 5 | 3.00 | 1.50 | 2.00 | 100.0 |" in text
    assert "- torchattacks: offline" in text
    assert max(len(line) for line in text.splitlines() if not line.startswith("|")) <= 120


def test_the_overhead_is_told_of_each_number_of_points():
    def pgd(points, seconds):
        made = run("pgd, arena", case="cifar", seconds=seconds)
        return measuring.Run("cifar", 0, "pgd, arena", 1, 0, {**made.cell, "n": points, "bare": 10.0})

    found = [pgd(8, 10.4), pgd(16, 10.3), pgd(8, 10.52), pgd(8, 11.0), run("autoattack", case="cifar", seconds=1.6)]
    told = page._overheads(found, "autoattack")
    assert told[0] == ["`pgd` over its bare passes, `cifar`, 8 points", "at most 1.05", "1.052", "**no**"]
    assert told[1] == ["`pgd` over its bare passes, `cifar`, 16 points", "at most 1.05", "1.030", "**yes**"]
    assert told[2] == ["`autoattack` over its bare passes, `cifar`, 8 points", "at most 1.15", "2.000", "**no**"]
    rows = tables.overhead(found).rows[1:]
    assert [(row[1], row[2], row[8]) for row in rows] == [
        ("pgd, arena", "8", "1.05"),
        ("autoattack", "8", "2.00"),
        ("pgd, arena", "16", "1.03"),
    ]


def test_what_was_played_in_bf16_is_held_against_the_same_bounds(tmp_path):
    bf16 = [
        run("quick, bf16", broken=(0, 1, 3), forwards=10, backwards=4, seconds=0.1),
        run("autoattack, bf16", broken=(0, 1, 2), forwards=90, backwards=40, seconds=1.5),
    ]
    settings = measuring.Settings(**{**SETTINGS, "fast": "quick", "bf16": True, "frontier": ()})
    text = page.write(None, measuring.Found([*RUNS, *bf16]), settings, WAYS, "python benchmarks/ensemble.py", [])
    held = {row.split("|")[1].strip(): row.split("|")[3:5] for row in text.splitlines() if row.startswith("| ")}
    for asked, measured, holds in (
        ("`quick, bf16` not above `autoattack`, pooled, points", "+0.00", "**yes**"),
        ("forwards, the plain run over `quick, bf16`", "40.0", "**yes**"),
        ("seconds, the plain run over `quick, bf16`", "60.0", "**yes**"),
        ("points on which `autoattack, bf16` and the plain run differ", "1 and 1, p = 1.000", "-"),
        ("seconds, the plain run over `autoattack, bf16`", "4.00", "**yes**"),
        ("seconds, the plain run over `autoattack`", "2.50", "**no**"),
    ):
        assert [cell.strip() for cell in held[asked]] == [measured, holds]
    for title in ("`quick` against `autoattack`", "`quick, bf16` against `autoattack`"):
        assert f"## {title}" in text
    assert "| `cnn` | quick, bf16 | autoattack, bf16 | 1 | 9.00 | 10.0 | 15.0 | " in text


def test_a_way_that_met_the_plain_run_on_some_cases_only_says_on_which():
    more = [
        run("autoattack, plain", case="long", forwards=500, backwards=200, seconds=6.0),
        run("autoattack, bf16, compiled", forwards=90, backwards=40, seconds=1.0),
        run("autoattack, bf16", forwards=90, backwards=40, seconds=2.0),
        run("autoattack, bf16", case="long", forwards=90, backwards=40, seconds=2.0),
    ]
    rows = {row[0]: row[2] for row in page.asked(measuring.Found([*RUNS, *more]), WAYS).rows}
    assert rows["seconds, the plain run over `autoattack, bf16, compiled` (`cnn` only)"] == "6.00"
    assert rows["seconds, the plain run over `autoattack, bf16`"] == "3.00"  # two cases, 12 s over 4


def test_a_variant_of_a_member_stands_in_a_row_of_its_own():
    ways = ("square, arena", measuring.opposing("square"), measuring.opposing("square", "to the rim"))
    runs = [run(way, broken=broken) for way, broken in zip(ways, ((0, 1), (0,), (0, 1)), strict=True)]
    rows = {tuple(row[:2]): row[5:7] for row in tables.members(runs).rows[1:]}
    assert rows["`square`", "`cnn`"] == ["1", "0"]
    assert rows["`square`, theirs to the rim", "`cnn`"] == ["0", "0"]


def test_attacks_share_the_seconds():
    attacks = [dict(zip(("name", "forwards", "backwards", "seconds"), a, strict=True)) for a in ATTACK_ROWS]
    some = measuring.Run("cnn", 0, "autoattack", 1, 0, {**cell(), "attacks": attacks})
    rows = tables.by_attack([some], ["autoattack", "reference"]).rows
    assert rows[1:] == [
        ["autoattack", "`apgd_ce`", "2.0", "2.0", "25 %"],
        ["autoattack", "`square`", "8.0", "0.0", "75 %"],
    ]


def test_a_run_that_differs_from_the_others_of_its_way_is_counted():
    assert page.differing_runs(RUNS) == 0
    assert page.differing_runs([*RUNS, run("quick", pair=2, broken=(0,), forwards=8, backwards=4)]) == 1


def test_the_frontier_compares_entries_on_the_models_that_all_met():
    more = [run("fgsm", broken=(0,), forwards=2, backwards=1)]  # seed 1 was not measured
    found = {s.entry: s for s in spots([*RUNS, *more], ("fgsm", "quick", "autoattack"), "autoattack")}
    assert list(found) == ["fgsm", "quick", "autoattack"]  # the cheapest first
    assert found["quick"].robust == 62.5
    assert found["fgsm"].standing == pytest.approx(3 / 7)
    assert (found["fgsm"].only_entry, found["fgsm"].only_full) == (0, 2)
    assert found["fgsm"].worst_gap == 25.0
    assert len(frontier([*found.values()], "autoattack").rows) == 4
    assert spots([], ("fgsm",), "autoattack") == []


@given(st.lists(st.tuples(st.sampled_from("ab"), st.lists(st.booleans(), min_size=6, max_size=6)), max_size=5))
def test_swapping_the_sides_swaps_the_counts(masks):
    half = [(images, np.array(m[:3]), np.array(m[3:])) for images, m in masks]
    b, c, p = discordant(half)
    assert discordant([(images, y, x) for images, x, y in half]) == (c, b, p)
    twice = discordant(half * 2)
    assert twice == (2 * b, 2 * c, p)  # the same images again are no new evidence


def test_what_is_left_out_is_said_once_for_each_way_and_reason():
    left = {
        "runs: cnn, train seed 0, autoattack, plain": "not measured",
        "runs: long, train seed 2, autoattack, plain": "not measured",
        "runs: cnn, train seed 1, autoattack, plain": "it fell over",
        "art": "not installed",
    }
    assert page.gathered(left) == [
        "- runs, autoattack, plain: not measured (cnn 0, long 2)",
        "- runs, autoattack, plain: it fell over (cnn 1)",
        "- art: not installed",
    ]
