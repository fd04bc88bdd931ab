"""Command lines in this process, and planted results."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest

from arena.cli import run
from arena.store import Outcomes, open_store


@pytest.fixture(autouse=True)
def _own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("ARENA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("ARENA_STORE", raising=False)


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def refusal(self) -> str:
        """The one line that an exit code of 2 owes the user."""
        assert self.code == 2, (self.code, self.out, self.err)
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("arena: error: ")
        assert self.out == ""
        return lines[0].removeprefix("arena: error: ")


@pytest.fixture
def arena(capfd):
    """Run a command line: ``arena("show", "abc")``."""

    def call(*args: str) -> Done:
        capfd.readouterr()
        code = run(list(args))
        return Done(code, *capfd.readouterr())

    return call


def row(name: str, roster: str | None, broken: int, left: float | None, **more: Any) -> dict[str, Any]:
    made = {
        "name": name,
        "options": {},
        "roster": roster,
        "plugin": "adversarial-arena 0.1.0",
        "status": "ok",
        "attempted": 390,
        "broken": broken,
        "robust_accuracy": None,
        "cumulative_accuracy": left,
        "ci95": None,
        "unique_broken": None,
        "forwards": 39000,
        "backwards": 38610,
        "seconds": 12.345,
        "violations": {},
        "borderline": 0,
        "error": None,
    }
    return made | more


def sweep_row(lam: str, robust: float) -> dict[str, Any]:
    options = {"lam": lam, "steps": "20"}
    return row(f"lambda_pgd(lam={lam})", "adaptive", 100, None, options=options, robust_accuracy=robust)


RECORD: dict[str, Any] = {
    "schema": 1,
    "id": "0123456789ab",
    "defense": "fgaa_sat",
    "protocol": "standard",
    "asked": {
        "vs": ["autoattack", "adaptive"],
        "dataset": "digits",
        "backbone": "cnn",
        "threat": {"norm": "Linf", "eps": "0.2", "eps_value": 0.2},
        "n": 400,
        "seed": 0,
        "train_seed": 0,
        "indices_sha256": "i" * 64,
        "data_sha256": "d" * 64,
        "subset_rule": "stratified-v1",
        "card": None,
    },
    "model": {
        "id": "model of fgaa_sat",
        "twin": "sat",
        "origin": "adversarial-arena 0.1.0",
        "parameters": 1,
        "trained": {},
    },
    "natural": {"accuracy": 97.5, "ci95": [95.5, 98.6]},
    "attacks": [
        row("apgd_ce", "autoattack", 100, 72.5, robust_accuracy=72.5),
        row("apgd_t", "autoattack", 20, 67.5),
        sweep_row("0", 91.25),
        sweep_row("1", 60.25),
        sweep_row("10", 48.5),
        row("apgd_ce(head=head1)", "adaptive", 250, 35.0),
    ],
    "rosters": [
        {"name": "autoattack", "robust_accuracy": 67.5, "ci95": [62.7, 71.9], "members": ["apgd_ce", "apgd_t"]},
        {"name": "adaptive", "robust_accuracy": 35.0, "ci95": [30.5, 39.8], "members": ["a"] * 4},
    ],
    "sweeps": [
        {
            "name": "lambda_pgd",
            "robust_accuracy": 45.75,
            "ci95": [40.9, 50.7],
            "members": ["lambda_pgd(lam=0)", "lambda_pgd(lam=1)", "lambda_pgd(lam=10)"],
        }
    ],
    "worst_case": {"robust_accuracy": 34.5, "ci95": [30.0, 39.3], "broken_by": {"apgd_ce": 100}},
    "audit": {"verdict": "not_audited", "indicators": []},
    "examples": {"file": "examples/0123456789ab.npz", "sha256": "e" * 64},
    "notes": ["no point of class 7 among the 400 points"],
    "provenance": {"started": "2026-11-20T10:00:00+00:00", "seconds": 75.0},
}
for _roster in RECORD["rosters"]:
    _roster |= {"complete": True, "forwards": 78000, "backwards": 77220, "seconds": 24.69}


@pytest.fixture
def record():
    """A result of fgaa_sat, free to be changed."""
    return copy.deepcopy(RECORD)


@pytest.fixture
def plant():
    """Put a record into the store; the first points survive, as many as its worst case says."""

    def put(made: dict[str, Any], question: str = "q") -> dict[str, Any]:
        n = made["asked"]["n"]
        held = round((made["worst_case"]["robust_accuracy"] or 0) * n / 100)
        with open_store() as store:
            store.put(question, made, Outcomes.of(range(n), [True] * n, [j >= held for j in range(n)]))
        return made

    return put


@pytest.fixture
def played(monkeypatch):
    """Replace the playing: set ``played.answer(question, running) -> record``, look at ``played.asked``."""
    import arena.match as match

    class Played:
        def __init__(self) -> None:
            self.asked: list[Any] = []
            self.stored = False
            self.answer: Any = lambda question, running: copy.deepcopy(RECORD)

    state = Played()

    def play(question, running, registry, watch):
        state.asked.append((question, running))
        return match.Answered(state.answer(question, running), state.stored)

    monkeypatch.setattr(match, "play", play)
    return state
