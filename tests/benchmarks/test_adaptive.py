"""Leaving one out is counted by points: planted breaks give planted worth."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from loading import as_module

PATH = Path(__file__).parents[2] / "benchmarks" / "adaptive.py"


@pytest.fixture(scope="module")
def adaptive():
    return as_module(PATH)


def points(*broken: int) -> np.ndarray:
    mask = np.zeros(8, bool)
    mask[list(broken)] = True
    return mask


@pytest.fixture
def match(adaptive):
    broken = {
        ("autoattack", "apgd_t"): points(0, 1),
        ("adaptive", "joint_t(steps=20,weights=first)"): points(0, 2, 3),
        ("adaptive", "lambda_pgd(lam=2)"): points(2, 4),
        ("adaptive", "lambda_pgd(lam=10)"): points(3, 4),
        ("adaptive", "apgd_ce(head=probe1,steps=50)"): points(1, 2),
    }
    return adaptive.Matrix("built-in", "d_sat", 0, 8, 87.5, "sat", broken, dict.fromkeys(broken, 10.0))


def test_worth_is_what_would_stand(adaptive, match):
    rows = {r["name"]: r for r in adaptive.worth([match, match], adaptive.member)}
    assert {k: (r["only"], r["first"], r["beyond"]) for k, r in rows.items()} == {
        "joint_t(steps=20,weights=first)": (2, 6, 0),  # point 0 in each match, which autoattack breaks too
        "lambda_pgd(lam=2)": (0, 2, 0),
        "lambda_pgd(lam=10)": (0, 0, 0),
        "apgd_ce(head=*,steps=50)": (2, 2, 0),
    }
    together = {r["name"]: r for r in adaptive.worth([match], adaptive.family)}
    assert together["lambda_pgd"]["only"] == 1  # rows of a sweep hide each other
    assert together["lambda_pgd"]["beyond"] == 1
    assert together["lambda_pgd"]["cost"] == 20


def test_the_headline_counts_pairs_and_credits_the_first(adaptive, match):
    assert match.robust("autoattack") == 87.5 - 25
    assert match.robust("adaptive") == 87.5 - 62.5
    b, c, p = adaptive.beyond([match])
    assert (b, c) == (3, 0)
    assert p == 0.25
    assert adaptive.credit([match]) == "`joint_t(steps=20,weights=first)` 2, `lambda_pgd(lam=2)` 1"
    assert "`d_sat`" in adaptive.page([match], 8, [0], "3")


def test_train_seeds_of_one_test_image_are_no_new_evidence(adaptive, match):
    b, c, p = adaptive.beyond([match] * 3)
    assert (b, c) == (9, 0)
    assert p == 0.25  # three images, not nine
    swapped = replace(
        match, broken={({"autoattack": "adaptive"}.get(e, "autoattack"), k): v for (e, k), v in match.broken.items()}
    )
    assert adaptive.beyond([match, swapped]) == (3, 3, 1.0)
