"""The standings, from planted results."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys

import pytest

from arena.leaderboard import as_csv, as_json, as_markdown, span, standings
from arena.store import Outcomes, open_store

N = 400


def attack(name: str, roster: str, status: str = "ok") -> dict:
    return {"name": name, "roster": roster, "status": status, "forwards": 1000, "backwards": 500}


def result(result_id: str, defense: str, held: int, *, eps: str = "0.2", n: int = N, model: str = "", **more) -> dict:
    """A result whose worst case leaves the first ``held`` of n points; every attack done unless told otherwise."""
    statuses = {"autoattack": "ok", "adaptive": "ok", **more.pop("statuses", {})}
    worst = 100 * held / n
    return {
        "schema": 1,
        "id": result_id,
        "defense": defense,
        "protocol": more.pop("protocol", "standard"),
        "asked": {
            "dataset": "digits",
            "data_sha256": more.pop("data", "d" * 64),
            "indices_sha256": "i" * 64,
            "backbone": "cnn",
            "threat": {"norm": "Linf", "eps": eps, "eps_value": 0.2},
            "n": n,
            "train_seed": more.pop("train_seed", 0),
        },
        "model": {"id": model or f"model of {defense}"},
        "natural": {"accuracy": 97.5},
        "attacks": [attack(f"{r}_member", r, s) for r, s in statuses.items() if s != "absent"],
        "rosters": [
            {"name": r, "robust_accuracy": worst + 5, "complete": s == "ok"}
            for r, s in statuses.items()
            if s != "absent"
        ],
        "worst_case": {"robust_accuracy": worst, "ci95": [worst - 4, worst + 4], "broken_by": {}},
        "audit": {"verdict": more.pop("verdict", "not_audited"), "indicators": []},
        "provenance": {"started": "2026-11-20T10:00:00+00:00"},
        **more,
    }


def points(held: int, n: int = N) -> Outcomes:
    return Outcomes.of(range(n), [True] * n, [j >= held for j in range(n)])


@pytest.fixture
def board(tmp_path, monkeypatch):
    monkeypatch.setenv("ARENA_HOME", str(tmp_path))
    with open_store() as store:

        def add(result_id: str, defense: str, held: int, **more) -> None:
            made = result(result_id.ljust(12, "0"), defense, held, **more)
            store.put(result_id, made, points(held, made["asked"]["n"]))

        store.add = add
        yield store


def test_best_first_with_shared_ranks(board):
    board.add("a", "rt", 2)
    board.add("b", "sat", 250)
    board.add("c", "fgaa_sat", 247)
    (table,) = standings(board)
    assert [(r.defense, span(r.rank)) for r in table.rows] == [("sat", "1-2"), ("fgaa_sat", "1-2"), ("rt", "3")]
    assert not table.unranked
    top = table.rows[0]
    assert (top.worst_case, top.autoattack, top.verdict, top.passes) == (62.5, 67.5, "not_audited", 3000)
    assert top.date == "2026-11-20"


def test_order_of_points_in_a_result_does_not_matter(board):
    board.add("a", "sat", 250)
    made = result("b" * 12, "trades", 250)
    order = list(range(N))[::-1]
    board.put("b", made, Outcomes.of(order, [True] * N, [j >= 250 for j in order]))
    (table,) = standings(board)
    assert [r.rank for r in table.rows] == [(1, 2), (1, 2)]


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"statuses": {"adaptive": "absent"}}, "adaptive not played"),
        ({"statuses": {"autoattack": "failed"}}, "autoattack incomplete (1 failed)"),
        ({"statuses": {"autoattack": "absent", "adaptive": "partial"}}, "autoattack not played; adaptive incomplete"),
        ({"verdict": "void"}, "verdict void"),
    ],
)
def test_incomplete_results_are_listed_with_the_reason(board, more, reason):
    board.add("a", "sat", 250)
    board.add("b", "wonder", 399, **more)
    (table,) = standings(board)
    assert [(r.defense, r.rank) for r in table.rows] == [("sat", (1, 1))]
    assert [(r.defense, r.rank) for r in table.unranked] == [("wonder", None)]
    assert reason in table.unranked[0].reason


def test_the_newest_rankable_result_of_a_model_counts(board):
    board.add("a", "sat", 250)
    board.add("b", "sat", 240)
    board.add("c", "sat", 390, statuses={"adaptive": "absent"})
    (table,) = standings(board)
    assert [(r.result[0], r.worst_case) for r in table.rows] == [("b", 60.0)]
    assert not table.unranked


def test_equal_keys_only_are_compared(board):
    board.add("a", "sat", 250)
    board.add("b", "fgaa_sat", 300, eps="1/5")
    board.add("c", "sat", 100, eps="0.3")
    board.add("d", "sat", 60, n=100)
    board.add("e", "sat", 250, data="e" * 64)
    tables = standings(board)
    assert sorted((t.n, t.data_sha256[0], len(t.rows)) for t in tables) == [
        (100, "d", 1),
        (400, "d", 1),
        (400, "d", 2),
        (400, "e", 1),
    ]
    assert [t.n for t in standings(board, eps="3/10")] == [400]
    assert len(standings(board, n=100)) == 1
    assert standings(board, norm="L2") == []
    assert standings(board, dataset="mnist") == []


def test_filter_by_defense_keeps_the_ranks(board):
    board.add("a", "rt", 2)
    board.add("b", "sat", 250)
    board.add("c", "fgaa_sat(lam=1)", 100, model="x")
    (table,) = standings(board, defense="fgaa_sat")
    assert [(r.defense, r.rank) for r in table.rows] == [("fgaa_sat(lam=1)", (2, 2))]
    assert standings(board, defense="nothing") == []


def test_chosen_results_win_over_newer_ones(board):
    board.add("a", "sat", 250)
    board.add("b", "sat", 240)
    (table,) = standings(board, results=["a" + "0" * 11])
    assert [r.result[0] for r in table.rows] == ["a"]


def test_paper_protocol_has_no_place_here(board):
    board.add("a", "sat", 250, protocol="paper")
    assert standings(board) == []


def test_formats_tell_the_same(board):
    board.add("a", "sat", 250, train_seed=3)
    board.add("b", "fgaa_sat", 300, statuses={"adaptive": "absent"})
    tables = standings(board)
    data = json.loads(json.dumps(as_json(tables)))
    assert data[0]["ranked"][0]["rank"] == [1, 1]
    assert data[0]["threat"] == {"norm": "Linf", "eps": "0.2"}
    rows = list(csv.DictReader(io.StringIO(as_csv(tables))))
    assert [(r["defense"], r["rank_best"], r["adaptive"]) for r in rows] == [("sat", "1", "67.5"), ("fgaa_sat", "", "")]
    assert rows[1]["reason"] == "adaptive not played"
    text = as_markdown(tables)
    assert "| 1 | sat (train seed 3) | cnn | 97.5 | 62.5 (57.7-67.1) | 67.5 | 67.5 | not_audited | 3000 |" in text
    assert "- fgaa_sat, worst case 75.0 (70.5-79.0): adaptive not played" in text


def test_a_match_that_was_never_played_has_no_number(board):
    nothing = {"robust_accuracy": None, "ci95": None, "broken_by": {}}
    board.add("a", "sat", 250)
    board.add("b", "liar", 250, worst_case=nothing, verdict="void", attacks=[])
    (table,) = standings(board)
    assert [(r.defense, r.worst_case, r.reason) for r in table.unranked] == [("liar", None, "verdict void")]
    assert "- liar, worst case -: verdict void" in as_markdown([table])
    assert "liar,cnn,0,97.5,,,," in as_csv([table])


def test_no_torch_is_imported(board):
    board.add("a", "sat", 250)
    code = (
        "import sys; from arena.leaderboard import standings; from arena.store import open_store; "
        "assert standings(open_store()); print([m for m in ('torch', 'numpy', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_kinder_line_up_later_does_not_make_a_model_better(board):
    """Verified breaks of any match of the model count."""
    board.add("a1", "sat", 240)
    board.add("a2", "sat", 400)
    (table,) = standings(board)
    (row,) = table.rows
    assert row.worst_case == 60.0
    assert row.ci95[0] < 60.0 < row.ci95[1]
