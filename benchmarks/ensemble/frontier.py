"""Robust accuracy against passes: what more of them buys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from findings.figures import BLUE, ORANGE, axis, canvas, rendered
from findings.judging import Table

from .measuring import Run
from .tables import accuracy, cases_of, compare, couples, first, interval

#: Where a figure's labels stand, from their dots, in points.
SHIFT = (5, 4)


@dataclass(frozen=True)
class Spot:
    """An entry over all models that every entry met."""

    entry: str
    robust: float
    """Percent of all points."""
    interval: str
    worst_gap: float
    """Largest difference to the full roster's robust accuracy over cases, in points."""
    worst_case: str
    forwards: float
    """A naturally correct point."""
    backwards: float
    standing: float
    """Passes, forwards and backwards, for each point that stands in the end."""
    only_entry: int
    only_full: int


def spots(runs: Sequence[Run], entries: Sequence[str], full: str) -> list[Spot]:
    """Return the entries that were measured, cheapest first, each on the models that all of them met."""
    met = [{(r.case, r.seed) for r in first(runs, e)} for e in entries]
    met = [m for m in met if m]
    shared = set.intersection(*met) if met else set()
    some = [r for r in runs if (r.case, r.seed) in shared]
    found = []
    for entry in dict.fromkeys(entries):
        mine, pairs = first(some, entry), couples(some, entry, full)
        word = compare(pairs)
        if word is None:
            continue
        gaps = [(accuracy([a for a, _ in p]) - accuracy([b for _, b in p]), c) for c, p in _by_case(some, entry, full)]
        points, left = sum(int(r.natural.sum()) for r in mine), sum(r.standing for r in mine)
        forwards, backwards = (sum(r.cell[k] for r in mine) for k in ("forwards", "backwards"))
        found.append(
            Spot(
                entry,
                accuracy(mine),
                interval(mine),
                *max(gaps),
                forwards / points,
                backwards / points,
                (forwards + backwards) / max(left, 1),
                word.only_a,
                word.only_b,
            )
        )
    return sorted(found, key=lambda s: s.standing)


def _by_case(runs: Sequence[Run], entry: str, full: str) -> list[tuple[str, list[tuple[Run, Run]]]]:
    return [(case, couples(runs, entry, full, case)) for case in cases_of(first(runs, entry))]


def frontier(found: Sequence[Spot], full: str) -> Table:
    """Lay the spots out."""
    head = ["entry", "forwards", "backwards", "passes a point that stands", "robust", "95 % interval"]
    rows = [[*head, "worst gap", "on", "only it", f"only `{full}`"]]
    for s in found:
        passes = [f"{s.forwards:.1f}", f"{s.backwards:.1f}", f"{s.standing:.0f}"]
        gap = [f"{s.worst_gap:+.2f}", f"`{s.worst_case}`"]
        rows.append([f"`{s.entry}`", *passes, f"{s.robust:.2f}", s.interval, *gap, str(s.only_entry), str(s.only_full)])
    return Table(rows)


def figure(found: Sequence[Spot], full: str) -> bytes:
    """Draw the spots as SVG: pooled robust accuracy, and the worst case's gap to the full roster, against passes."""
    drawn = canvas(9.0, 3.8)
    label = "passes a point that stands"
    left = axis(drawn, label, "robust accuracy, all models (%)", 121)
    right = axis(drawn, label, f"worst case's gap to {full} (points)", 122)
    for made, height in ((left, lambda s: s.robust), (right, lambda s: s.worst_gap)):
        _dots(made, found, height)
    return rendered(drawn, "svg")


def _dots(made: Any, found: Sequence[Spot], height: Any) -> None:
    best = float("inf")
    for k, s in enumerate(found, 1):  # the cheapest first: what is lower than all before is on the frontier
        ahead = height(s) < best
        best = min(best, height(s))
        look = {"color": BLUE if ahead else ORANGE, "ms": 6, "label": f"{k}  {s.entry}", "linestyle": ""}
        made.plot([s.standing], [height(s)], "o" if ahead else "x", **look)
        made.annotate(str(k), (s.standing, height(s)), SHIFT, textcoords="offset points", fontsize=7)
    made.legend(fontsize=6, frameon=False, loc="upper right")
    made.set_xscale("log")
    made.margins(x=0.25)
