"""``verify``: which packages it loads, what it prints; the scoring itself is replaced."""

from __future__ import annotations

import json

import pytest

import arena.verify
from arena.plugins import BUILT_IN
from arena.verify import Verification


@pytest.fixture
def scored(monkeypatch):
    """Replace the scoring; ``calls`` holds what it was asked."""
    calls = []
    found = {
        "agrees": True,
        "claimed": 262,
        "confirmed": 262,
        "natural_errors": 0,
        "refuted": 0,
        "borderline": 1,
        "violations": {},
    }
    found |= {"natural": 97.5, "robust_accuracy": 34.5, "ci95": [30.0, 39.3], "model": "m" * 64, "lines": []}

    def verify(what, registry, watch, **options):
        calls.append((what, registry, options))
        return Verification(**found)

    monkeypatch.setattr(arena.verify, "verify", verify)
    verify.calls, verify.found = calls, found
    return verify


def test_agreement(arena, scored, plant, record):
    plant(record)
    done = arena("verify", "0123", "--device", "cpu")
    assert done.code == 0
    assert "confirmed: 262 of 262 examples break the model" in done.out
    assert "worst case 34.5 % (95 %: 30.0 to 39.3) natural 97.5 %" in " ".join(done.out.split())
    ((what, registry, options),) = scored.calls
    assert what == "0123"
    assert options["device"] == "cpu"
    assert {p.distribution for p in registry.plugins} == {BUILT_IN}


def test_disagreement(arena, scored, plant, record):
    plant(record)
    scored.found |= {
        "agrees": False,
        "confirmed": 260,
        "natural_errors": 3,
        "violations": {"outside_ball": 2},
        "lines": ["two [are] outside"],
    }
    done = arena("verify", "0123")
    assert done.code == 1
    assert "DISAGREES: 260 of 262" in done.out
    assert "2 outside_ball" in done.out
    assert "3 of points misclassified anyway" in done.out
    assert "! two [are] outside" in done.out
    done = arena("verify", "0123", "--json")
    assert (done.code, json.loads(done.out)["lines"]) == (1, ["two [are] outside"])


def test_a_file_has_no_worst_case(arena, scored):
    scored.found |= {"robust_accuracy": None, "ci95": None}
    done = arena("verify", "sub.npz", "--against", "fgaa_sat(lam=1)", "--eps", "0.1", "--train-seed", "2")
    assert done.code == 0
    assert "worst case" not in done.out
    _, _, options = scored.calls[0]
    assert (options["against"], options["eps"], options["train_seed"]) == ("fgaa_sat(lam=1)", "0.1", 2)


def test_refusals(arena, scored):
    assert arena("verify", "abc").refusal == "unknown result 'abc'; the store is empty"
    assert "no such file" in arena("verify", "none.json").refusal
    missing = arena("verify", "x.npz", "--against", "sat", "--plugin", "nowhere").refusal
    assert missing.startswith("unknown package with plugins 'nowhere'")
    assert not scored.calls
