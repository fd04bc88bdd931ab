"""What passes cost with nothing around them, timed in turn with the attacks that make them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from arena.pace import bare_pass
from arena.target import Target
from arena.watch import Silent

#: Seconds that one look takes, after a pair of passes that is not timed; and the least pairs.
A_LOOK, LEAST = 0.5, 5
#: Looks inside a run take about this share of its seconds; inside a short one, half.
SHARE, HALF = 0.1, 0.5


@dataclass
class Bare:
    """Bare passes of one model at one batch size."""

    target: Target
    rows: Tensor
    """(batch, C, H, W)."""
    times: dict[bool, list[float]] = field(default_factory=lambda: {False: [], True: []})
    """Wall seconds a row of a forward, and of a forward with gradient and its backward."""

    @classmethod
    def of(cls, target: Target, x: Tensor, batch: int) -> Bare:
        """Time batches of ``batch`` rows of images (N, C, H, W), repeated where there are fewer."""
        return cls(target, x[torch.arange(min(batch, len(x)) or 1) % max(len(x), 1)])

    def look(self, seconds: float = A_LOOK) -> None:
        """Time passes for a while."""
        began, turn = time.perf_counter(), 0
        while turn <= LEAST or time.perf_counter() - began < seconds:
            for grad, kept in self.times.items():
                start = time.perf_counter()
                bare_pass(self.target, self.rows, grad)
                if turn:
                    kept.append((time.perf_counter() - start) / len(self.rows))
            turn += 1

    def seconds(self, forwards: int, backwards: int) -> float:
        """Return what so many forwards and backwards, of rows, take: each backward with a forward of its own."""
        forward, both = (statistics.median(self.times[grad]) for grad in (False, True))
        return max(forwards - backwards, 0) * forward + backwards * both


class Looking(Silent):
    """Looks at bare passes again and again while a match goes on: what else the machine does meets both alike."""

    def __init__(self, bare: Bare, share: float = SHARE) -> None:
        self.bare, self.share = bare, share
        self.took = self.cpu = 0.0
        """Seconds of all looks, wall and of the process, which are among the match's own."""
        self._due = 0.0

    def advance(self, done: int, note: str = "") -> None:
        """Look, if it is time."""
        began = time.perf_counter()
        if began >= self._due:
            looked = timed(lambda: self.bare.look(0.0))
            self.took, self.cpu = self.took + looked.seconds, self.cpu + looked.cpu
            self._due = began + looked.seconds / self.share


@dataclass(frozen=True)
class Timed:
    """How long some work took."""

    seconds: float
    """Wall."""
    cpu: float
    """Of the process, all threads."""

    def record(self) -> dict[str, Any]:
        """Return the part of a cell."""
        return {"seconds": round(self.seconds, 6), "cpu": round(self.cpu, 6)}


def timed(work: Callable[[], None]) -> Timed:
    """Time some work."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Timed(time.perf_counter() - wall, time.process_time() - cpu)
