"""What the square attack knows of its proposals without a pass, and passes over (Linf, small images, on a CPU)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from arena.attack import State
from arena.threat import Threat

from .square_patches import Patches

#: Proposals that a row looks at before random numbers are drawn again.
AHEAD = 128
#: Most squares of a side that anything is kept of.
MOST = 2**13


class Memory:
    """Notes of squares that do not raise the margin of the point that a row holds.

    Those that change no pixel do not, and those that were refused will not, as long as the point is the same and the
    model no other. ``state["known"]`` (N, count) says which these are, of one side, until the query ``until`` (N,); it
    begins anew when a proposal was kept. ``numbers`` (N, AHEAD) are the squares that come, from the query ``first`` on.
    """

    def __init__(self, patches: Patches, threat: Threat, sides: Sequence[int], draw: Callable[..., Tensor]) -> None:
        """Take in the plan.

        Args:
            patches: the squares of an image.
            threat: the ball.
            sides: of the square of each query, from query 1 on.
            draw: ``draw(index, restart, steps)`` returns the numbers (N, AHEAD) of what queries (N, AHEAD) propose.
        """
        self.patches, self.threat, self.draw = patches, threat, draw
        self.queries = len(sides)
        kinds = sorted(set(sides))
        self.table = torch.cat([patches.table(size) for size in kinds])
        """Of all squares of all sides, what they push."""
        self.sides = torch.tensor(sides)
        self.begins = torch.tensor([kinds.index(size) * patches.count for size in sides])
        """Of each query, where the squares of its side begin in the table."""
        turns, turn = [], self.queries + 1
        for query in range(self.queries, 0, -1):
            turns.append(turn)
            if query > 1 and sides[query - 2] != sides[query - 1]:
                turn = query
        self.turns = torch.tensor(turns[::-1])
        """Of each query, the next that proposes squares of another side, or the one after the last."""

    def start(self, y: Tensor) -> State:
        """Return the state of rows of which nothing is known."""
        n = len(y)
        return {
            "numbers": torch.zeros(n, AHEAD, dtype=torch.int64),
            "first": torch.full_like(y, -AHEAD),
            "known": torch.zeros(n, self.patches.count, dtype=torch.bool),
            "until": torch.zeros_like(y),
        }

    def forget(self, new: State, rows: Tensor) -> None:
        """Begin anew for the rows of a mask (N,), whose proposals are others now."""
        new["first"] = new["first"].masked_fill(rows, -AHEAD)
        new["until"] = new["until"].masked_fill(rows, 0)

    def skip(self, new: State, better: Tensor, broken: Tensor) -> None:
        """Note what the query before ``step`` showed, and move ``step`` on to the first one whose answer is not known.

        Args:
            new: the state, its point ``held`` already the better one.
            better: (N,) bool, its proposal was kept.
            broken: (N,) bool, rows that propose nothing more.
        """
        known, numbers, first, step = new["known"].clone(), new["numbers"], new["first"].clone(), new["step"].clone()
        until = new["until"].masked_fill(better, 0)
        done = new["done"] | broken
        told = (~better & ~done & (step > 1)).nonzero().squeeze(1)
        known[told, numbers[told, step[told] - 1 - first[told]]] = True
        rows = ((step <= self.queries) & ~done).nonzero().squeeze(1)
        while len(rows):
            stale = rows[step[rows] >= until[rows]]
            if len(stale):
                self._learn(new, stale, step, known, until)
            spent = rows[step[rows] - first[rows] >= AHEAD]
            if len(spent):
                # where no square of the side is left to ask, on to the next side
                over = known[spent].all(1)
                jump = spent[over]
                step[jump] = until[jump]
                first[jump] = step[jump] - AHEAD
                if not over.all():  # draw for all that will soon need it, too
                    spent = rows[(step[rows] - first[rows] >= AHEAD // 2) & (step[rows] < until[rows])]
                    queries = step[spent].unsqueeze(1) + torch.arange(AHEAD)
                    drawn = self.draw(new["index"][spent], new["restart"][spent], queries)
                    numbers = numbers.index_copy(0, spent, drawn)
                    first[spent] = step[spent]
            step[rows], asks = self._next(rows, step, first, numbers, known, until)
            rows = rows[~asks & (step[rows] <= self.queries)]
        new.update(known=known, numbers=numbers, first=first, step=step, until=until)

    def _learn(self, new: State, rows: Tensor, step: Tensor, known: Tensor, until: Tensor) -> None:
        """Know of these rows' squares of the side at hand which would change nothing.

        Nothing is known where no margin was yet above -inf: the point held is then the image, which nobody asked.
        """
        query = step[rows] - 1
        until[rows] = self.turns[query]
        sizes = self.sides[query]
        for size in sizes.unique().tolist():
            some = rows[sizes == size]
            idle = self.patches.idle(self.threat, new["x"][some], new["held"][some], size)
            known[some] = idle & (new["value"][some] > -torch.inf).unsqueeze(1)

    def _next(
        self, rows: Tensor, step: Tensor, first: Tensor, numbers: Tensor, known: Tensor, until: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the next query to look at, and whether to ask it: else its side is new, or it is not drawn yet."""
        places = torch.arange(AHEAD)
        first, until = first[rows].unsqueeze(1), until[rows].unsqueeze(1)
        dead = known.flatten()[rows.unsqueeze(1) * known.shape[1] + numbers[rows]]
        beyond = places >= until - first
        stop = (~dead | beyond) & (places >= step[rows].unsqueeze(1) - first)
        stops = stop.any(1)
        at = stop.to(torch.uint8).argmax(1)
        asks = stops & ~beyond.gather(1, at.unsqueeze(1)).squeeze(1)
        return first.squeeze(1) + at.masked_fill(~stops, AHEAD), asks

    def pushes(self, new: State) -> Tensor:
        """Return what the proposal of each row's query pushes, int8 (N, H + C * W); anything for rows past the last."""
        at = (new["step"] - new["first"]).clamp(0, AHEAD - 1)
        number = new["numbers"].gather(1, at.unsqueeze(1)).squeeze(1)
        begin = self.begins[(new["step"] - 1).clamp(0, self.queries - 1)]
        return self.table.index_select(0, begin + number)
