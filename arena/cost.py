"""What a match can cost, told before it starts: an upper bound of its passes, and how long they may take.

The bound is exact in what it counts: an ask/tell attack says the most a point can cost, and no attack meets more
than the naturally correct points. What a plain attack costs nobody knows; such attacks are named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from arena.pace import Pace

#: Seconds of measured attacks from which on their pace corrects the forecast.
TRUST = 1.0


@dataclass(frozen=True)
class Bound:
    """The most one attack of a match can cost."""

    entry: str
    """Entry of ``--vs`` it belongs to."""
    name: str
    passes: tuple[int, int] | None
    """(forwards, backwards) an example; None: nobody knows."""
    alone: bool
    """It meets all points, whatever the attacks before it broke."""


@dataclass(frozen=True)
class Bill:
    """The most a match can cost."""

    bounds: tuple[Bound, ...]
    """In the order of play."""
    points: int
    """Points an attack can meet."""

    @property
    def forwards(self) -> int:
        """Forwards of all attacks whose cost is known."""
        return self.points * sum(b.passes[0] for b in self.bounds if b.passes)

    @property
    def backwards(self) -> int:
        """Backwards of all attacks whose cost is known."""
        return self.points * sum(b.passes[1] for b in self.bounds if b.passes)

    @property
    def unknown(self) -> list[str]:
        """Attacks whose cost nobody knows."""
        return list(dict.fromkeys(b.name for b in self.bounds if b.passes is None))

    def record(self) -> dict[str, Any]:
        """Return the record's ``cost``."""
        return {"forwards": self.forwards, "backwards": self.backwards, "unknown": self.unknown}

    def line(self, pace: Pace | None) -> str:
        """Write it in one line, with a time where the pace is known."""
        total, many = self.forwards + self.backwards, len(self.bounds)
        text = f"at most {brief(total)} passes ({many} attack{'s' * (many != 1)}, {self.points} points)"
        if self.unknown:
            text += f", and what nobody knows of {', '.join(self.unknown)}"
        if pace is None or not total:
            return text
        seconds = pace.bare(self.forwards, self.backwards)
        return f"{text}; about {lasting(seconds)} at {brief(total / seconds)} passes/s"


class Forecast:
    """What is left of a match in seconds: from its bill, the pace measured, and what its attacks really took."""

    def __init__(self, bill: Bill, pace: Pace | None) -> None:
        self.bill, self.pace = bill, pace
        self._took = self._bare = 0.0

    def ahead(self, place: int, points: int) -> tuple[float | None, float, bool]:
        """Return what the attack at ``place`` of the bill may take, what all later ones may, and if some are unknown.

        ``points`` is how many it meets: attacks behind it in the same cascade meet no more.
        """
        entry, later = self.bill.bounds[place].entry, self.bill.bounds[place + 1 :]
        cascaded = not self.bill.bounds[place].alone
        after = [self._seconds(b, points if cascaded and b.entry == entry and not b.alone else None) for b in later]
        known = [seconds for seconds in after if seconds is not None]
        return self._seconds(self.bill.bounds[place], points), sum(known), len(known) < len(after)

    def _seconds(self, bound: Bound, points: int | None) -> float | None:
        if bound.passes is None or self.pace is None:
            return None
        met = self.bill.points if points is None else points
        slower = self._took / self._bare if self._took >= TRUST and self._bare else 1.0
        return slower * met * self.pace.bare(*bound.passes)

    def took(self, forwards: int, backwards: int, seconds: float) -> None:
        """Take in what an attack that ran from its beginning has really cost."""
        if self.pace is not None:
            self._took += seconds
            self._bare += self.pace.bare(forwards, backwards)


def brief(number: float) -> str:
    """Write a number in brief, two digits of it rounded up: ``950``, ``38k``, ``4.9 M``."""
    if number >= 100:
        unit = 10 ** (len(str(math.ceil(number))) - 2)
        number = math.ceil(number / unit) * unit
    for size, letter in ((1e9, " G"), (1e6, " M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.0f}"


def lasting(seconds: float) -> str:
    """Write a duration in words: ``2 minutes``."""
    for size, word in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.0f} {word}s"
    return f"{seconds:.0f} seconds" if seconds >= 1.5 else "1 second" if seconds >= 0.95 else "a second at most"


#: Tells the most passes of an attack.
Price = Callable[[Any], "tuple[int, int] | None"]


def bill_of(groups: Sequence[Any], price: Price, points: int, alone: bool) -> Bill:
    """Add up a line-up.

    Args:
        groups: entries of ``--vs`` (``arena.lineup.Group``), in the order of play.
        price: tells what an attack can cost an example.
        points: points an attack can meet.
        alone: all attacks meet all points.
    """
    bounds = [Bound(g.name, p.name, price(p), alone or p.standalone) for g in groups for p in g.attacks]
    return Bill(tuple(bounds), points)
