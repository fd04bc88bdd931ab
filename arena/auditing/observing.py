"""Watches an ask/tell attack at work: does it see a break and then hand over something else?

Pintor et al. 2022 (arXiv 2106.09947) call this silent success. What was seen of a row is in the row's state, so that a
match that was killed, or one in other batches, sees the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from arena.attack import SURE, Answer, IteratedAttack, Query, State
from arena.engine import SEEN
from arena.referee import relative_margin
from arena.threat import Threat

#: A margin, as a share of the logits' spread, that counts as a mistake; closer to zero rounding decides.
CLEARLY = 1e-3
#: State key: answers told about the row.
TOLD = "_told"


class Observed:
    """An attack that notes in ``state[SEEN]`` for which rows some query inside ball and box was a clear mistake.

    Only one answer in ``every`` of a row is looked at.
    """

    def __init__(self, attack: IteratedAttack, threat: Threat, every: int = 1) -> None:
        self.attack, self.threat, self.every = attack, threat, every
        self._points: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.attack, name)

    def start(self, index: Tensor, x: Tensor, y: Tensor, clean: Tensor) -> State:
        """Begin rows, of which nothing was seen."""
        zero = torch.zeros_like(y)
        return {**self.attack.start(index, x, y, clean), SEEN: zero.bool(), TOLD: zero}

    def ask(self, state: State) -> Query:
        """Note which points are asked for."""
        query = self.attack.ask(state)
        self._points = query.points
        return query

    def tell(self, state: State, answer: Answer) -> State:
        """Note which of them are mistakes."""
        new = self.attack.tell(state, answer)  # before anybody waits for a GPU
        told, seen = state[TOLD] + 1, state[SEEN]
        found = answer.errors >= SURE
        if self.every > 1:
            found &= (told % self.every == 0).unsqueeze(1)
        if self._points is not None and bool(found.any()):
            rows, which = found.nonzero(as_tuple=True)
            y, logits, point = state["y"], answer.logits[rows, which], self._points[rows, which]
            clear = ~(relative_margin(logits, y[rows]) >= -CLEARLY)  # or not finite
            box = ((point >= 0) & (point <= 1)).flatten(1).all(1)
            inside = self.threat.inside(state["x"][rows], point) & box & clear
            seen = seen.index_fill(0, rows[inside], True)
        return {**new, SEEN: seen, TOLD: told}

    def passes(self) -> tuple[int, int]:
        """Return the most (forwards, backwards) one row can cost."""
        return self.attack.passes()
