"""Intervals, exact paired tests, rank ranges: laws and values known from tables."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arena.statistics import holm, mcnemar, rank_ranges, wilson


def test_wilson_known_values():
    # Newcombe, Statistics in Medicine 17, 1998, table I: 81/263, 15/148, 0/20, 1/29, z = 1.96
    for k, n, low, high in ((81, 263, 25.53, 36.62), (15, 148, 6.24, 16.05), (0, 20, 0.0, 16.11), (1, 29, 0.61, 17.18)):
        assert wilson(k, n) == pytest.approx((low, high), abs=0.006)


@given(st.integers(1, 20000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_estimate_and_mirrors(kn):
    k, n = kn
    low, high = wilson(k, n)
    assert 0 <= low <= 100 * k / n <= high <= 100
    assert low < high
    mirrored = wilson(n - k, n)
    assert (100 - mirrored[1], 100 - mirrored[0]) == pytest.approx((low, high), abs=1e-9)


@pytest.mark.parametrize(("k", "n"), [(1, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_nonsense(k, n):
    with pytest.raises(ValueError, match="wilson"):
        wilson(k, n)


def binomial_p(b: int, c: int) -> Fraction:
    n = b + c
    return min(Fraction(1), Fraction(2 * sum(math.comb(n, i) for i in range(min(b, c) + 1)), 2**n))


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_exact_binomial_test(b, c):
    assert mcnemar(b, c) == pytest.approx(float(binomial_p(b, c)), rel=1e-12)
    assert mcnemar(b, c) == mcnemar(c, b)


def test_mcnemar_with_many_points():
    assert mcnemar(0, 0) == 1
    assert mcnemar(5, 5) == 1
    assert mcnemar(700, 800) == pytest.approx(float(binomial_p(700, 800)), rel=1e-9)
    assert mcnemar(5000, 5100) == pytest.approx(math.erfc((100 - 1) / math.sqrt(2 * 10100)), rel=0.01)
    assert mcnemar(0, 5000) == 0.0


@given(st.integers(0, 200), st.integers(0, 200))
def test_mcnemar_shrinks_with_imbalance(b, c):
    if c >= b:
        assert mcnemar(b, c + 1) <= mcnemar(b, c) + 1e-15


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_between_plain_and_bonferroni_and_keeps_the_order(p):
    adjusted = holm(p)
    for plain, new in zip(p, adjusted, strict=True):
        assert plain <= new <= min(1.0, len(p) * plain)
    for i in range(len(p)):
        for k in range(len(p)):
            if p[i] <= p[k]:
                assert adjusted[i] <= adjusted[k]


tables = st.integers(1, 60).flatmap(
    lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=1, max_size=6)
)


@given(tables)
def test_plain_rank_lies_in_the_range(table):
    ranges = rank_ranges(table)
    scores = [sum(row) for row in table]
    for score, (best, worst) in zip(scores, ranges, strict=True):
        assert 1 <= best <= worst <= len(table)
        above = sum(s > score for s in scores)
        level = sum(s == score for s in scores)
        assert best <= above + level
        assert worst >= above + 1


@given(tables, st.randoms())
def test_ranges_ignore_the_order_of_points_and_follow_entries(table, random):
    ranges = rank_ranges(table)
    points = list(range(len(table[0])))
    random.shuffle(points)
    entries = list(range(len(table)))
    random.shuffle(entries)
    shuffled = rank_ranges([[table[e][j] for j in points] for e in entries])
    assert shuffled == [ranges[e] for e in entries]


@given(tables)
def test_a_copy_shares_its_range(table):
    ranges = rank_ranges([*table, table[0]])
    assert ranges[0] == ranges[-1]


def test_far_apart_are_told_apart_and_close_ones_share():
    n = 500
    strong, close = [j < 300 for j in range(n)], [j < 297 for j in range(n)]
    weak = [j < 50 for j in range(n)]
    assert rank_ranges([weak, strong, close]) == [(3, 3), (1, 2), (1, 2)]


def test_a_chain_of_neighbours_does_not_make_its_ends_equal():
    n = 500
    chain = [[j < 300 - 4 * i for j in range(n)] for i in range(10)]
    ranges = rank_ranges(chain)
    assert ranges[0][0] == 1
    assert ranges[0][1] < 10
    assert ranges[9][0] > 1
    for i in range(9):  # neighbours differ in four points: never told apart
        assert ranges[i][0] <= ranges[i + 1][1]


def test_unequal_points_are_refused():
    with pytest.raises(ValueError, match="different numbers"):
        rank_ranges([[True], [True, False]])
