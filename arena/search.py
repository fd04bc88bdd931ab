"""The search copy of one match: made cheap where that is proven, timed once, watched, and tried in two precisions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from arena.cheaper import Cheaper, make_cheaper
from arena.check import PROBE
from arena.engine import Outcome, confirm
from arena.guard import Guard
from arena.journal import AttackKeeper, Keepers
from arena.lineup import Planned
from arena.pace import SIZES, Pace, measure
from arena.points import Rows
from arena.question import Running
from arena.surface import Surface
from arena.target import Target

#: Attacks all points, or some by their positions (M,), and keeps them.
Try = Callable[[Tensor | None, AttackKeeper | Keepers], Outcome]


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
    ) -> None:
        """Make the copy, and measure how fast it is and at which batch size.

        Args:
            build: makes a fresh model, in eval mode.
            surface: what attackers may use.
            n_classes: width of the logits.
            x: images (N, C, H, W) of the match; the first few are looked at.
            met: mask (N,), the points that attacks can meet: no batch is larger.
            running: device, precision and batch size.
        """
        self._build, self._surface, self._n_classes, self._running = build, surface, n_classes, running
        self._x = x[:PROBE]
        self.again = 0
        """Points attacked once more in fp32, because only bf16 saw them broken."""
        self._make()
        images = x[met.nonzero().squeeze(1)[: SIZES[-1]]]
        self.pace = measure(self.target, images if len(images) else x[: SIZES[-1]], running.batch_size)

    def _make(self) -> None:
        running = self._running
        model, self.cheaper = make_cheaper(self._build, self._surface, self._x, running.precision)
        self.target = Target(
            model, self._surface, self._n_classes, device=running.device, precision=self.cheaper.precision
        )
        self.guard = Guard(self.target, self._x)

    def renew(self) -> None:
        """Put a fresh copy in the place of one that was changed; its pace is known."""
        size = self.target.batch_size
        self._make()
        self.target.batch_size = size

    def attack(
        self,
        planned: Planned,
        y: Tensor,
        once: Try,
        keeper: Callable[[str], AttackKeeper | Keepers],
        broken: Callable[[Outcome], Tensor],
        over: Callable[[], bool],
    ) -> tuple[Outcome, float]:
        """Attack in the search's precision, and in fp32 once more what bf16 alone saw broken; return the seconds too.

        Plain attacks run in fp32: they do not say which points they let go early.

        Args:
            planned: the attack.
            y: labels (N,) of its points.
            once: attacks points.
            keeper: makes a keeper, by what is added to the attack's own name.
            broken: the referee's word on an outcome, (N,) bool.
            over: tells whether the time is up, so that no second try may begin.
        """
        first = keeper("")
        if self.target.precision == "fp32" or planned.spec.spec.run:
            with self.target.in_fp32():
                outcome = once(None, first)
            outcome.gives_up = planned.spec.spec.gives_up
            return outcome, first.seconds()
        outcome = once(None, first)
        outcome.gives_up = planned.spec.spec.gives_up
        seconds = first.seconds()
        second: list[AttackKeeper | Keepers] = []

        def again(denied: Tensor) -> Outcome:
            if over():
                return Outcome.empty(outcome.x_adv[denied])
            second.append(keeper("-fp32"))
            return once(denied, second[0])

        self.again += confirm(outcome, self.target, y, broken(outcome), again)
        return outcome, seconds + sum(k.seconds() for k in second)

    def enter(self, record: dict[str, Any]) -> None:
        """Write into a record what the search was, and what its passes would have cost with nothing around them."""
        for row in record["rosters"]:
            row["bare"] = None
            if self.pace is not None:
                row["bare"] = round(self.pace.bare(row["forwards"], row["backwards"]), 6)
        known = [row["bare"] for row in record["rosters"] if row["bare"] is not None]
        record["provenance"]["bare_seconds"] = round(sum(known), 6) if self.pace is not None else None
        search = {"batch_size": self.target.batch_size, "again": self.again}
        record["provenance"]["search"] = {**self.cheaper.record(), **search}
