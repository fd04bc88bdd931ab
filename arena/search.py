"""The search copy of one match: made cheap where that is proven, timed once, watched."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

from arena.cheaper import Cheaper, make_cheaper
from arena.check import PROBE
from arena.compiling import compile_passes, uneven
from arena.engine import Outcome
from arena.graphs import record_passes, recordable
from arena.guard import Guard
from arena.lineup import Planned
from arena.pace import A_STEP, SIZES, Pace, measure
from arena.points import Rows
from arena.question import Running
from arena.surface import Surface
from arena.target import LIVE, Target


class Search:
    """What the attacks of a match query. The referee never does."""

    target: Target
    cheaper: Cheaper
    pace: Pace | None
    """What bare passes cost; None where they raise."""
    guard: Guard

    def __init__(
        self,
        build: Callable[[], nn.Module],
        surface: Surface,
        n_classes: int,
        x: Rows,
        met: Tensor,
        running: Running,
        passes: tuple[int, int] = (0, 0),
    ) -> None:
        """Make the copy, and measure how fast it is and at which batch size.

        Args:
            build: makes a fresh model, in eval mode.
            surface: what attackers may use.
            n_classes: width of the logits.
            x: images (N, C, H, W) of the match; the first few are looked at.
            met: mask (N,), the points that attacks can meet: no batch is larger.
            running: device, precision and batch size.
            passes: the most forwards and backwards that attacks make of it.
        """
        self._build, self._surface, self._n_classes, self._running = build, surface, n_classes, running
        self._x = x[:PROBE]
        self._make()
        images = x[met.nonzero().squeeze(1)[: SIZES[-1]]]
        images = images if len(images) else x[: SIZES[-1]]
        self.pace = measure(self.target, images, running.batch_size, passes)
        if self.cheaper.compiled and (why := uneven(self.target, self._x, (self.target.batch_size,))):
            self.target.compiled, self.cheaper = None, self.cheaper.and_compiled(why)
            self._record()
            self.pace = measure(self.target, images, self.target.batch_size, passes)
        if self.pace is not None:
            self.target.live = min(LIVE, int(A_STEP / self.pace.both) + 1)

    def _make(self) -> None:
        running = self._running
        model, self.cheaper = make_cheaper(self._build, self._surface, self._x, running.precision)
        self.target = Target(
            model, self._surface, self._n_classes, device=running.device, precision=self.cheaper.precision
        )
        if running.compile:
            self.cheaper = self.cheaper.and_compiled(compile_passes(self.target, self._x))
        self._record()
        self.guard = Guard(self.target, self._x)

    def _record(self) -> None:
        if recordable(self.target):
            self.cheaper = self.cheaper.and_recorded(record_passes(self.target, self._x))

    def renew(self) -> None:
        """Put a fresh copy in the place of one that was changed; its pace is known."""
        size, live = self.target.batch_size, self.target.live
        self._make()
        self.target.batch_size, self.target.live = size, live

    def attack(self, planned: Planned, once: Callable[[], Outcome]) -> Outcome:
        """Attack ``once`` in the search's precision; plain attacks in fp32, because what they see nobody looks at."""
        with self.target.in_fp32() if planned.spec.spec.run else nullcontext():
            outcome = once()
        outcome.gives_up = planned.spec.spec.gives_up
        return outcome

    def enter(self, record: dict[str, Any], again: int) -> None:
        """Write into a record what the search was, and what its passes would have cost with nothing around them.

        ``again`` are the forwards made once more in fp32.
        """
        for row in record["rosters"]:
            row["bare"] = None
            if self.pace is not None:
                row["bare"] = round(self.pace.bare(row["forwards"], row["backwards"]), 6)
        known = [row["bare"] for row in record["rosters"] if row["bare"] is not None]
        record["provenance"]["bare_seconds"] = round(sum(known), 6) if self.pace is not None else None
        search = {"batch_size": self.target.batch_size, "again": again}
        done, compiled, graphs = self.cheaper, self.target.compiled, self.target.graphs
        if compiled is not None and compiled.given_up:
            done = done.and_compiled(f"given up on the way: {compiled.given_up}")
        if graphs is not None and graphs.given_up:
            done = done.and_recorded(f"given up on the way: {graphs.given_up}")
        record["provenance"]["search"] = {**done.record(), **search}
