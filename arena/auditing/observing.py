"""Watches an ask/tell attack at work: does it see a break and then hand over something else?

Pintor et al. 2022 (arXiv 2106.09947) call this silent success. The engine knows nothing of it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from arena.attack import SURE, Answer, IteratedAttack, Query, State
from arena.referee import relative_margin
from arena.threat import Threat

#: A margin, as a share of the logits' spread, that counts as a mistake; closer to zero rounding decides.
CLEARLY = 1e-3


class Observed:
    """An attack, and the data-set indices of rows for which some query inside ball and box was a clear mistake.

    Only one answer in ``every`` is looked at.
    """

    def __init__(self, attack: IteratedAttack, threat: Threat, every: int = 1) -> None:
        self.attack, self.threat = attack, threat
        self.every, self._told = every, 0
        self.seen: set[int] = set()
        self._points: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.attack, name)

    def start(self, index: Tensor, x: Tensor, y: Tensor, clean: Tensor) -> State:
        """Begin rows."""
        return self.attack.start(index, x, y, clean)

    def ask(self, state: State) -> Query:
        """Note which points are asked for."""
        query = self.attack.ask(state)
        self._points = query.points
        return query

    def tell(self, state: State, answer: Answer) -> State:
        """Note which of them are mistakes."""
        self._told += 1
        if self._told % self.every:
            return self.attack.tell(state, answer)
        y = state["y"]
        rows, which = (answer.errors >= SURE).nonzero(as_tuple=True)
        if len(rows) and self._points is not None:
            logits, point = answer.logits[rows, which], self._points[rows, which]
            clear = ~(relative_margin(logits, y[rows]) >= -CLEARLY)  # or not finite
            box = ((point >= 0) & (point <= 1)).flatten(1).all(1)
            inside = self.threat.inside(state["x"][rows], point) & box & clear
            self.seen.update(state["index"][rows[inside]].tolist())
        return self.attack.tell(state, answer)

    def passes(self) -> tuple[int, int]:
        """Return the most (forwards, backwards) one row can cost."""
        return self.attack.passes()
