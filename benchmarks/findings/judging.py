"""What a finding is, and the one rule by which measured numbers confirm or refute what was predicted.

Numbers are series: one value a test point, for each train seed. A criterion compares their mean with a bound. It holds
where every train seed's mean is on the predicted side and so is the whole 95 % interval; it fails where all of that is
on the other side; else it is open. A finding is confirmed where all its criteria hold, refuted where one fails,
undecided else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from arena.statistics import wilson

#: One value for each point; percentages are 0 or 100, or a share times 100.
Series = list[float]
#: Draws of the bootstrap, and its seed.
DRAWS, SEED = 2000, 0


def number(value: float, digits: int = 1) -> str:
    """Write a number; nothing is minus zero."""
    return f"{round(float(value), digits) + 0.0:.{digits}f}"


@dataclass(frozen=True)
class Data:
    """What was measured for one finding: series by name, for each train seed."""

    seeds: Mapping[int, Mapping[str, Series]]

    def names(self) -> list[str]:
        """Return the series that every seed has."""
        found = [list(s) for s in self.seeds.values()]
        return [k for k in found[0] if all(k in names for names in found)] if found else []

    def rows(self, name: str) -> np.ndarray:
        """Return a series of every seed: (seeds, points)."""
        return np.array([s[name] for s in self.seeds.values()], dtype=float)

    def mean(self, name: str) -> float:
        """Return the mean over points and seeds."""
        return float(self.rows(name).mean())

    def cell(self, name: str, digits: int = 1) -> str:
        """Return ``mean (lowest to highest seed)``; one seed: the mean alone."""
        each = self.rows(name).mean(1)
        mean, low, high = (number(v, digits) for v in (each.mean(), each.min(), each.max()))
        return mean if len(each) == 1 else f"{mean} ({low} to {high})"


@dataclass(frozen=True)
class Criterion:
    """A number with a bound; ``rows`` is (seeds, points)."""

    says: str
    """What is compared, in words."""
    rows: np.ndarray
    above: bool
    """Whether it has to lie above the bound, or below."""
    bound: float
    digits: int = 1
    kind: str = "number"
    """``share``: every value is 0 or 100; ``difference``: one of two such; else any ``number``."""

    def interval(self) -> tuple[float, float]:
        """Return the 95 % interval of the mean over seeds, by resampling points; all seeds have the same points.

        Where no point or every point does the same, resampling sees no spread; so a share's interval is at least
        Wilson's, and a difference's at least Newcombe's of the points that only one side has right.
        """
        points = self.rows.mean(0)
        n = len(points)
        draws = np.random.default_rng(SEED).integers(0, n, (DRAWS, n))
        low, high = np.percentile(points[draws].mean(1), (2.5, 97.5))
        if self.kind != "number":
            first, second = np.maximum(points, 0).mean(), np.maximum(-points, 0).mean()
            (l1, u1), (l2, u2) = (wilson(round(n * share / 100), n) for share in (first, second))
            if self.kind == "share":
                l2 = u2 = second
            mean = first - second
            low = min(low, mean - math.hypot(first - l1, u2 - second))
            high = max(high, mean + math.hypot(u1 - first, second - l2))
        return float(low), float(high)

    def state(self) -> str:
        """Return ``holds``, ``fails`` or ``open``."""
        values = np.array([*self.rows.mean(1), *self.interval()])
        right, wrong = values > self.bound, values < self.bound
        if not self.above:
            right, wrong = wrong, right
        return "holds" if right.all() else "fails" if wrong.all() else "open"


def above(says: str, rows: np.ndarray, bound: float, **how: Any) -> Criterion:
    """Return a criterion that asks for more than ``bound``."""
    return Criterion(says, rows, True, bound, **how)


def below(says: str, rows: np.ndarray, bound: float, **how: Any) -> Criterion:
    """Return a criterion that asks for less than ``bound``."""
    return Criterion(says, rows, False, bound, **how)


def verdict(criteria: Sequence[Criterion]) -> str:
    """Return ``confirmed``, ``refuted`` or ``undecided``; without criteria ``not measured``."""
    states = [c.state() for c in criteria]
    if not states:
        return "not measured"
    return "refuted" if "fails" in states else "confirmed" if set(states) == {"holds"} else "undecided"


@dataclass(frozen=True)
class Table:
    """Rows of text; the first row is the head."""

    rows: list[list[str]]
    note: str = ""


@dataclass(frozen=True)
class Finding:
    """A prediction, how it is measured, and what would confirm or refute it."""

    name: str
    title: str
    claim: str
    """What a paper prints or promises, and what is suspected of it."""
    predicted: str
    """One sentence."""
    how: str
    """What was done, with settings."""
    subjects: tuple[str, ...]
    """Trained models needed: ``defense`` or ``defense@backbone``."""
    measure: Callable[[Any], dict[str, Series]]
    """Takes a ``bench.Bench`` of one train seed; returns series of one value a point."""
    criteria: Callable[[Data], list[Criterion]]
    tables: Callable[[Data], list[Table]]
    why: Mapping[str, str] = field(default_factory=dict)
    """A sentence by verdict, beside what the criteria say."""
    figure: Callable[[Any, Data], None] | None = None
    """Draws on a matplotlib figure."""
    caption: str = ""
    needs: tuple[str, ...] = ()
    """Attacks that have to be registered."""
    measured: str = ""
    """Name of the measurement, where several findings share one; empty: the finding's own."""
    version: str = "1"
    """Raised when what is measured changes."""
