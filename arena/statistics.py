"""Intervals and paired tests for accuracies, in plain Python: exact where a sum of integers can be exact."""

from __future__ import annotations

import math
from collections.abc import Sequence

#: Level of the rank ranges: the chance, over all comparisons of a table together, of one false order.
ALPHA = 0.05


def wilson(k: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Return the Wilson score interval of ``k`` successes in ``n`` trials, in percent [0, 100].

    Wilson, Journal of the American Statistical Association 22, 1927. It always holds ``100 k / n``.

    Raises:
        ValueError: n below 1, or k outside 0 to n.
    """
    if n < 1 or not 0 <= k <= n:
        raise ValueError(f"wilson: expected 0 <= k <= n and n >= 1, got k={k}, n={n}")
    p, z2 = k / n, z * z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    # at the ends the formula is exactly 0 or 1; rounding must not say otherwise
    low = 0.0 if k == 0 else 100 * min(p, centre - half)
    high = 100.0 if k == n else 100 * max(p, centre + half)
    return low, high


def mcnemar(b: int, c: int) -> float:
    """Return the exact two-sided p-value of McNemar's test, in (0, 1].

    ``b`` points are right under the first model only, ``c`` under the second only. Under the null hypothesis ``b`` is
    binomial(b + c, 1/2); p is twice the smaller tail, at most 1. McNemar, Psychometrika 12, 1947, exact form. Numbers
    below the smallest float become 0.

    Raises:
        ValueError: a negative count.
    """
    if b < 0 or c < 0:
        raise ValueError(f"mcnemar: expected counts of at least 0, got {b} and {c}")
    n = b + c
    term = tail = 1
    for i in range(min(b, c)):
        term = term * (n - i) // (i + 1)
        tail += term
    return min(1.0, 2 * tail / 2**n) if n < 1000 else _ratio(2 * tail, n)


def _ratio(numerator: int, power: int) -> float:
    """Return numerator / 2**power, at most 1, without an overflow for large integers."""
    shift = max(0, numerator.bit_length() - 64)
    return min(1.0, math.ldexp(float(numerator >> shift), shift - power))


def holm(p: Sequence[float]) -> list[float]:
    """Return p-values adjusted by Holm's step-down method, in the order given.

    Rejecting where the adjusted value is at most alpha keeps the chance of any false rejection at alpha, whatever the
    dependence. Holm, Scandinavian Journal of Statistics 6, 1979.
    """
    adjusted = [1.0] * len(p)
    highest = 0.0
    for place, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        highest = max(highest, min(1.0, (len(p) - place) * p[i]))
        adjusted[i] = highest
    return adjusted


def rank_ranges(survived: Sequence[Sequence[bool]], alpha: float = ALPHA) -> list[tuple[int, int]]:
    """Return the best and the worst rank of each entry, from 1, in the order given.

    ``survived[i][j]`` tells whether entry i holds at point j; all entries have the same points in the same order. Every
    two entries are compared by the exact McNemar test on the points where they differ; the p-values of all pairs are
    adjusted together by Holm. Entry a is *clearly better* than b if a holds at more points and the adjusted p is at
    most ``alpha``. Then

        best rank  = 1 + number of entries clearly better,
        worst rank = number of entries - number of entries clearly worse.

    So entries that cannot be told apart share ranks, an entry's place by its plain score lies in its range, and, with
    probability at least ``1 - alpha``, all ranges together hold the true ranks. All pairs are compared and not only
    neighbours in the table: a chain of near neighbours does not make its two ends equal.

    Raises:
        ValueError: entries with different numbers of points.
    """
    m = len(survived)
    if len({len(s) for s in survived}) > 1:
        raise ValueError("rank_ranges: entries have different numbers of points")
    masks = [sum(1 << j for j, held in enumerate(s) if held) for s in survived]
    pairs = [(i, k) for i in range(m) for k in range(i + 1, m)]
    only = [((masks[i] & ~masks[k]).bit_count(), (masks[k] & ~masks[i]).bit_count()) for i, k in pairs]
    better, worse = [0] * m, [0] * m
    for (i, k), (b, c), p in zip(pairs, only, holm([mcnemar(b, c) for b, c in only]), strict=True):
        if p <= alpha and b != c:
            winner, loser = (i, k) if b > c else (k, i)
            better[loser] += 1
            worse[winner] += 1
    return [(1 + better[i], m - worse[i]) for i in range(m)]
