"""Linf proposals of the square attack as numbers, and memory for those whose answer is known without a pass.

A square of one side is told by its place and a sign a channel, and a small image has few of them: of side 1 on 1x8x8
there are 128. Half of these push a pixel to the edge at which it is already, and one that did not raise the margin will
not raise it when it comes again, as long as the point is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from arena.attack import State
from arena.threat import Threat

#: Added to a pixel, or taken from it, before projection: further than any ball and any box reaches.
BEYOND = 4
#: Proposals that a row looks at before random numbers are drawn again.
BLOCK = 128


class Patches:
    """Squares on an image of ``shape`` (C, H, W); the number of one is (top * W + left) * 2^C + a bit a channel."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.shape = shape
        channels, height, width = shape
        self.signs = 2**channels
        self.count = height * width * self.signs
        """Of numbers; those of squares that would reach over the rim mean none."""

    def numbers(self, top: Tensor, left: Tensor, coins: Tensor) -> Tensor:
        """Return the numbers (N,) of squares at (N,), (N,) with signs (N, C) in {0, 1}."""
        signs = (coins << torch.arange(self.shape[0], device=coins.device)).sum(1)
        return (top * self.shape[2] + left) * self.signs + signs

    def pushes(self, top: Tensor, left: Tensor, coins: Tensor, size: Tensor) -> Tensor:
        """Return int8 (N, H + C * W), whose outer product pushes squares of ``size`` (N,) beyond any ball and box.

        1 on the pixel rows that a square lies on; then ``BEYOND``, with a channel's sign, on its columns.
        """
        down, along = self.spans(top, left, size)
        signs = (coins * (2 * BEYOND) - BEYOND).to(torch.int8)
        return torch.cat((down.to(torch.int8), (along.unsqueeze(1) * signs.unsqueeze(2)).flatten(1)), 1)

    def table(self, size: int) -> Tensor:
        """Return ``pushes`` of all squares of a side by number, int8 (count, H + C * W)."""
        channels, _, width = self.shape
        number = torch.arange(self.count)
        place, bits = number // self.signs, number % self.signs
        coins = (bits.unsqueeze(1) >> torch.arange(channels)) & 1
        return self.pushes(place // width, place % width, coins, torch.full_like(number, size))

    def spans(self, top: Tensor, left: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """Tell which pixel rows, bool (N, H), and which columns, (N, W), squares lie on."""
        _, height, width = self.shape
        down = torch.arange(height, device=top.device) - top.unsqueeze(1)
        along = torch.arange(width, device=top.device) - left.unsqueeze(1)
        size = size.unsqueeze(1)
        return (down >= 0) & (down < size), (along >= 0) & (along < size)

    def idle(self, threat: Threat, x: Tensor, point: Tensor, size: int) -> Tensor:
        """Tell which squares of a side change no pixel of ``point`` (N, C, H, W), bool (N, count).

        Numbers that mean no square are among them.
        """
        channels, height, width = self.shape
        edges = torch.stack((threat.project(x, x - BEYOND), threat.project(x, x + BEYOND)), 1)
        differ = (edges != point.unsqueeze(1)).flatten(1, 2).float()
        windows = torch.nn.functional.max_pool2d(differ, size, stride=1).bool()
        down, along = windows.shape[2:]
        windows = windows.view(-1, 2, channels, down, along)
        changed = torch.zeros(len(x), height, width, self.signs, dtype=torch.bool, device=x.device)
        for signs in range(self.signs):
            for channel in range(channels):
                changed[:, :down, :along, signs] |= windows[:, signs >> channel & 1, channel]
        return ~changed.flatten(1)


class Memory:
    """What is known of proposals without asking: state keys ``block``, ``first``, ``known`` and ``until``.

    ``known`` (N, count) says which squares do not raise the margin of the point that a row holds. It speaks about
    squares of one side, until the query ``until`` (N,), and is learnt anew when a proposal was kept.
    """

    def __init__(self, patches: Patches, threat: Threat, sides: Sequence[int], draw: Callable[..., Tensor]) -> None:
        """Take in the plan.

        Args:
            patches: the squares of an image.
            threat: the ball.
            sides: of the square of each query, from query 1 on.
            draw: ``draw(index, restart, steps)`` returns the numbers (N, BLOCK) of what queries (N, BLOCK) propose.
        """
        self.patches, self.threat, self.draw = patches, threat, draw
        self.queries = len(sides)
        kinds = sorted(set(sides))
        self.table = torch.cat([patches.table(size) for size in kinds])
        self.sides = torch.tensor(sides)
        self.kind = torch.tensor([kinds.index(size) for size in sides])
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
            "block": torch.zeros(n, BLOCK, dtype=torch.int64, device=y.device),
            "first": torch.full_like(y, -BLOCK),  # query whose proposal stands first in the block
            "known": torch.zeros(n, self.patches.count, dtype=torch.bool, device=y.device),
            "until": torch.zeros_like(y),
        }

    def forget(self, new: State, rows: Tensor) -> None:
        """Begin anew for the rows of a mask (N,), whose proposals are others now."""
        new["first"] = new["first"].masked_fill(rows, -BLOCK)
        new["until"] = new["until"].masked_fill(rows, 0)

    def skip(self, new: State, better: Tensor, broken: Tensor) -> None:
        """Note what the query before ``step`` showed, and move ``step`` on to the first one whose answer is not known.

        Args:
            new: the state, its point ``held`` already the better one.
            better: (N,) bool, its proposal was kept.
            broken: (N,) bool, rows that propose nothing more.
        """
        known, block, first, step = new["known"].clone(), new["block"], new["first"].clone(), new["step"].clone()
        until = new["until"].masked_fill(better, 0)
        told = (~better & (step > 1)).nonzero().squeeze(1)
        known[told, block[told, step[told] - 1 - first[told]]] = True
        open_ = ((step <= self.queries) & ~broken).nonzero().squeeze(1)
        while len(open_):
            stale = open_[step[open_] >= until[open_]]
            if len(stale):
                self._learn(new, stale, step, known, until)
            spent = open_[step[open_] - first[open_] >= BLOCK]
            if len(spent):
                over = known[spent].all(1)
                jump, spent = spent[over], spent[~over]
                step[jump] = until[jump]
                first[jump] = step[jump] - BLOCK
                if len(spent):
                    spent = open_[(step[open_] - first[open_] >= BLOCK // 2) & (step[open_] < until[open_])]
                queries = step[spent].unsqueeze(1) + torch.arange(BLOCK, device=step.device)
                drawn = self.draw(new["index"][spent], new["restart"][spent], queries)
                block = block.index_copy(0, spent, drawn)
                first[spent] = step[spent]
            step[open_], found = self._next(open_, step, first, block, known, until)
            open_ = open_[~found & (step[open_] <= self.queries)]
        new.update(known=known, block=block, first=first, step=step, until=until)

    def _learn(self, new: State, rows: Tensor, step: Tensor, known: Tensor, until: Tensor) -> None:
        """Know of these rows' squares of the side at hand which would change nothing."""
        query = step[rows] - 1
        until[rows] = self.turns.to(rows.device)[query]
        sizes = self.sides.to(rows.device)[query]
        for size in sizes.unique().tolist():
            some = rows[sizes == size]
            known[some] = self.patches.idle(self.threat, new["x"][some], new["held"][some], size)

    def _next(
        self, rows: Tensor, step: Tensor, first: Tensor, block: Tensor, known: Tensor, until: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the next query to look at, and whether it is one to ask: else its side is new, or its block drawn."""
        places = torch.arange(BLOCK, device=rows.device)
        first, until = first[rows].unsqueeze(1), until[rows].unsqueeze(1)
        dead = known.flatten()[rows.unsqueeze(1) * known.shape[1] + block[rows]]
        beyond = places >= until - first
        stop = (~dead | beyond) & (places >= step[rows].unsqueeze(1) - first)
        found = stop.any(1)
        at = stop.to(torch.uint8).argmax(1)
        ask = found & ~beyond.gather(1, at.unsqueeze(1)).squeeze(1)
        return first.squeeze(1) + at.masked_fill(~found, BLOCK), ask

    def pushes(self, new: State) -> Tensor:
        """Return what the proposal of each row's query pushes, int8 (N, H + C * W); anything for rows past the last."""
        at = (new["step"] - new["first"]).clamp(0, BLOCK - 1)
        number = new["block"].gather(1, at.unsqueeze(1)).squeeze(1)
        kind = self.kind.to(number.device)[(new["step"] - 1).clamp(0, self.queries - 1)]
        self.table = self.table.to(number.device)
        return self.table.index_select(0, kind * self.patches.count + number)
