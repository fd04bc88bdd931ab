"""Square attack: random search with square patches, on scores alone.

Andriushchenko et al., ECCV 2020 (arXiv 1912.00049), algorithms 2 (Linf) and 3 (L2). Patch positions and signs are each
row's own, unlike the reference code, which shares them across the batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from arena.attack import Answer, Query, Setup, State

from .square_memory import MOST, Memory
from .square_patches import Patches
from .steps import lengths, rows, taken, wrong

#: Queries after which the share of changed pixels halves; counted as they are, not rescaled to other budgets.
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
#: Proposals whose random numbers are drawn at once: drawing them one by one would cost more than a small model.
BLOCK = 64


def side(query: int, p_init: float, height: int, width: int, smallest: int = 1) -> int:
    """Return the side of the square proposed at ``query`` (from 0): sqrt of the share p of the image's pixels.

    L2 takes at least 3 and an odd side. The side is cut to the image's shorter one.
    """
    share = p_init / 2 ** sum(query > at for at in HALVINGS)
    length = max(round(math.sqrt(share * height * width)), smallest)
    if smallest > 1 and length % 2 == 0:
        length += 1
    return min(length, height, width)


def bump(size: int) -> Tensor:
    """Return the L2 pattern eta of a square of side ``size``, (size, size), of length 1: half a hill, half a pit."""
    upper = size // 2
    pattern = torch.zeros(size, size, dtype=torch.float64)
    if upper:
        pattern[:upper] = _hill(upper, size)
    pattern[upper:] = -_hill(size - upper, size)
    return (pattern / pattern.norm()).float()


def _hill(height: int, width: int) -> Tensor:
    """Sum of nested rectangles around the centre, the k-th weighted 1 / k^2, of length 1."""
    hill = torch.zeros(height, width, dtype=torch.float64)
    row, column = height // 2, width // 2
    for k in range(max(row, column) + 1):
        hill[max(row - k, 0) : row + k + 1, max(column - k, 0) : column + k + 1] += 1 / (k + 1) ** 2
    return hill / hill.norm()


class Square:
    """One start and ``queries`` proposals a restart; a proposal that raises the margin is kept.

    A proposal costs a forward, unless its answer is known: where squares are so few that they come again (Linf), those
    that change nothing, or that were refused and meet the same point, are passed over (``attacks.square_memory``). That
    changes no outcome. A random model is asked for all: its answers differ, and the engine tells by a row's passes
    whether a lucky draw let it go. On a GPU all are asked too: passes take less there than finding the next.
    """

    needs_clean = False

    def __init__(self, setup: Setup, *, queries: int, p_init: float, restarts: int) -> None:
        self.setup = setup
        self.queries = queries
        self.restarts = restarts
        self.l2 = setup.threat.norm == "L2"
        self.words = 3 + -(-(setup.shape[0] + 1) // 32)  # random words a proposal
        _, height, width = setup.shape
        plan = [side(q, p_init, height, width, 3 if self.l2 else 1) for q in range(queries)]
        self.sides = torch.tensor(plan or [1])
        self.largest = max(plan or [1])
        self.patches = Patches(setup.shape)
        self.memory: Memory | None = None
        """Passes over proposals whose answer is known; None: all are asked."""
        if not self.l2 and not setup.surface.random and self.patches.count <= min(queries, MOST):
            self.memory = Memory(self.patches, setup.threat, plan, self._numbers)
        self.patterns = torch.zeros(0)
        if self.l2:
            # [2 side + transposed, row, column], zero beyond the side and in a margin of one
            self.patterns = torch.zeros(2 * self.largest + 2, self.largest + 1, self.largest + 1)
            for size in set(plan):
                self.patterns[2 * size, :size, :size] = bump(size)
                self.patterns[2 * size + 1, :size, :size] = bump(size).T

    def start(self, index: Tensor, x: Tensor, y: Tensor, clean: Tensor) -> State:
        """Begin rows with vertical stripes (Linf) or a tiling of bumps (L2)."""
        n = x.shape[0]
        off = torch.zeros(n, dtype=torch.bool, device=x.device)
        channels, height, width = self.setup.shape
        if self.memory and not x.is_cuda:
            proposals = self.memory.start(y)
        else:
            many, kind = (self.words, torch.int64) if self.l2 else (height + channels * width, torch.int8)
            proposals = {
                "block": torch.zeros(n, BLOCK, many, dtype=kind, device=x.device),  # as `_draw` makes them
                "drawn": torch.full_like(y, BLOCK),  # taken from the block
            }
        return {
            "point": self._stripes(index, 0, x),
            "held": x.clone(),  # best of this restart
            "value": torch.full((n,), -torch.inf, device=x.device),
            "step": torch.zeros_like(y),
            "restart": torch.zeros_like(y),
            **proposals,
            "best": x.clone(),
            "top": torch.full((n,), -torch.inf, device=x.device),
            "done": off,
        }

    def ask(self, state: State) -> Query:
        """Ask for the margin at the proposal."""
        return Query(points=state["point"].unsqueeze(1), objective="margin")

    def tell(self, state: State, answer: Answer) -> State:
        """Keep the proposal if it raised the margin, and propose the next."""
        point, value = state["point"], answer.values[:, 0]
        broken = wrong(answer)
        better = (value > state["value"]) | broken
        new = dict(state)
        new["held"] = taken(better, point, state["held"])
        new["value"] = value.where(better, state["value"])
        new["step"] = state["step"] + 1
        if memory := self._memory(new):
            memory.skip(new, better, broken)
        ended = new["step"] > self.queries
        over = bool((ended | broken).any())
        if over:
            self._close(new, broken, ended)
        proposal = self._proposal(new)
        asked: Tensor | int = 1
        if over:
            fresh = new["step"] == 0  # rows that have just begun a restart keep their stripes
            proposal = new["point"].where(rows(fresh, point), proposal)
            asked = ~fresh
        new["point"] = proposal
        if "drawn" in new:
            new["drawn"] = new["drawn"] + asked
        return new

    def _memory(self, state: State) -> Memory | None:
        """Return the memory that a state was begun with, if it was."""
        return None if "drawn" in state else self.memory

    def _proposal(self, new: State) -> Tensor:
        """Return what each row asks next, (N, C, H, W)."""
        if memory := self._memory(new):
            return self._linf(new, memory.pushes(new))
        if (new["drawn"] >= BLOCK).any():
            self._draw(new)
        return self._l2(new) if self.l2 else self._linf(new, self._next(new))

    def _close(self, new: State, broken: Tensor, ended: Tensor) -> None:
        over = ended | broken
        improved = over & ((new["value"] > new["top"]) | broken)
        new["best"] = taken(improved, new["held"], new["best"])
        new["top"] = new["value"].where(improved, new["top"])
        new["done"] = broken | (ended & (new["restart"] + 1 >= self.restarts))
        again = ended & ~new["done"]
        new["step"] = new["step"].masked_fill(again, 0)
        if again.any():
            new["restart"] = new["restart"] + again
            wide = rows(again, new["point"])
            new["point"] = self._stripes(new["index"], new["restart"], new["x"]).where(wide, new["point"])
            new["held"] = new["x"].where(wide, new["held"])
            new["value"] = new["value"].masked_fill(again, -torch.inf)
            if memory := self._memory(new):
                memory.forget(new, again)
            else:
                new["drawn"] = new["drawn"].masked_fill(again, BLOCK)

    def _draw(self, new: State) -> None:
        """Draw the next BLOCK proposals of all rows: numbers are keyed by step, so drawing early changes none."""
        steps = new["step"].clamp_min(1).unsqueeze(1) + torch.arange(BLOCK, device=new["step"].device)
        words = self._words(new["index"], new["restart"], steps)
        if self.l2:
            new["block"] = words.view(len(steps), BLOCK, self.words)
        else:
            size = self._sizes(steps)
            pushes = self.patches.pushes(*self._corner(words, size), self._coins(words)[:, :-1], size)
            new["block"] = pushes.view(len(steps), BLOCK, -1)
        new["drawn"] = torch.zeros_like(new["drawn"])

    def _numbers(self, index: Tensor, restart: Tensor, steps: Tensor) -> Tensor:
        """Return the numbers of the squares that queries (N, K) propose, int64 (N, K)."""
        words = self._words(index, restart, steps)
        corner = self._corner(words, self._sizes(steps))
        return self.patches.numbers(*corner, self._coins(words)[:, :-1]).view_as(steps)

    def _words(self, index: Tensor, restart: Tensor, steps: Tensor) -> Tensor:
        """Return the random words of queries (N, K), (N * K, words)."""
        index, restart = (one.repeat_interleave(steps.shape[1]) for one in (index, restart))
        return self.setup.stream.bits(index, restart, steps.flatten(), self.words)

    def _sizes(self, steps: Tensor) -> Tensor:
        """Return the sides that queries (N, K) propose, (N * K,)."""
        self.sides = self.sides.to(steps.device)
        return self.sides[(steps.flatten() - 1).clamp_max(len(self.sides) - 1)]

    def _taken(self, new: State) -> tuple[Tensor, Tensor]:
        """Return this proposal's random words (N, words) and its side (N,)."""
        self.sides = self.sides.to(new["step"].device)
        return self._next(new), self.sides[(new["step"] - 1).clamp(0, len(self.sides) - 1)]

    def _next(self, new: State) -> Tensor:
        """Return what the block (N, BLOCK, ...) holds for each row's next proposal, (N, ...)."""
        drawn = new["drawn"]
        at = torch.arange(0, len(drawn) * BLOCK, BLOCK, device=drawn.device) + drawn
        return new["block"].flatten(0, 1).index_select(0, at)

    def _corner(self, words: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """Place squares of ``size`` (N,) uniformly by two words each; the last row and column are reached too."""
        _, height, width = self.setup.shape
        return (words[:, 0] * (height - size + 1)) >> 32, (words[:, 1] * (width - size + 1)) >> 32

    def _window(self, top: Tensor, left: Tensor, size: Tensor) -> Tensor:
        """Mask of the squares, bool (N, 1, H, W)."""
        down, along = self.patches.spans(top, left, size)
        return (down.unsqueeze(2) & along.unsqueeze(1)).unsqueeze(1)

    def _coins(self, words: Tensor) -> Tensor:
        """Return C + 1 fair bits, one a channel and one more, from the fourth word on; int64 (N, C + 1)."""
        k = torch.arange(self.setup.shape[0] + 1, device=words.device)
        return (words[:, 3 + k // 32] >> (k % 32)) & 1

    def _linf(self, new: State, pushes: Tensor) -> Tensor:
        """Put pixels of the square at the ball's or the box's edge, by the sign of their channel.

        Projecting what was pushed beyond does that, and leaves the others, which are in ball and box, as they are.
        """
        channels, height, width = self.setup.shape
        square = pushes.to(torch.float32)
        down, along = square[:, :height].view(-1, 1, height, 1), square[:, height:].view(-1, channels, 1, width)
        return self.setup.threat.project(new["x"], torch.addcmul(new["held"], down, along))

    def _l2(self, new: State) -> Tensor:
        """Algorithm 3: empty one square, and spend its share of the ball, and what is unused, in another."""
        words, size = self._taken(new)
        x, channels = new["x"], self.setup.shape[0]
        delta = new["held"] - x
        top, left = self._corner(words, size)
        spend = self._window(top, left, size)
        # 16 bits each place the second square, so that one block of Philox is enough for a proposal
        halves = torch.stack(((words[:, 2] & 0xFFFF) << 16, words[:, 2] & 0xFFFF0000), dim=1)
        empty = self._window(*self._corner(halves, size), size)
        unused = (self.setup.threat.radius**2 - lengths(delta.flatten(1)).square()).clamp_min(0) / channels
        either = lengths((delta * (spend | empty)).flatten(2).flatten(0, 1)).square().view(-1, channels)
        length = (either + unused).sqrt()
        inside = delta * spend
        held = lengths(inside.flatten(2).flatten(0, 1)).view(-1, channels, 1, 1)
        direction = self._pattern(words, top, left, size) + inside / held.clamp_min(1e-12)
        norm = lengths(direction.flatten(2).flatten(0, 1)).view(-1, channels, 1, 1)
        direction = direction * (length.view(-1, channels, 1, 1) / norm.clamp_min(1e-12))
        return self.setup.threat.project(x, x + direction.where(spend, delta.masked_fill(empty, 0.0)))

    def _pattern(self, words: Tensor, top: Tensor, left: Tensor, size: Tensor) -> Tensor:
        """Place bumps, one sign a channel, transposed at random, at the squares; float (N, C, H, W)."""
        _, height, width = self.setup.shape
        self.patterns = self.patterns.to(words.device)
        coins = self._coins(words)
        # a pixel outside the square falls on the table's zero margin: its last row or column
        down = torch.arange(height, device=top.device) - top.unsqueeze(1)
        along = torch.arange(width, device=top.device) - left.unsqueeze(1)
        down = torch.where(down < 0, self.largest, down.clamp_max(self.largest))
        along = torch.where(along < 0, self.largest, along.clamp_max(self.largest))
        which = (size * 2 + coins[:, -1]).view(-1, 1, 1)
        placed = self.patterns[which, down.unsqueeze(2), along.unsqueeze(1)].unsqueeze(1)
        return placed * (coins[:, :-1] * 2 - 1)[:, :, None, None]

    def _stripes(self, index: Tensor, restart: Tensor | int, x: Tensor) -> Tensor:
        """Return the start: vertical stripes of eps (Linf), bumps tiling the image scaled to eps (L2)."""
        threat, (channels, height, width) = self.setup.threat, self.setup.shape
        if not self.l2:
            bits = self.setup.stream.bits(index, restart, 0, channels * width) & 1
            change = (bits * 2 - 1).to(torch.float32).view(-1, channels, 1, width) * threat.radius
            return (x + change).clamp(0, 1)
        size = max(1, min(height, width) // 5)
        down, along = height // size, width // size
        bits = self.setup.stream.bits(index, restart, 0, (channels + 1) * down * along) & 1
        bits = bits.view(-1, channels + 1, down, along).repeat_interleave(size, 2).repeat_interleave(size, 3)
        tile = bump(size).to(x.device)
        tiles = torch.where(bits[:, -1:] == 1, tile.T.repeat(down, along), tile.repeat(down, along))
        delta = torch.zeros_like(x)
        above, before = (height - down * size) // 2, (width - along * size) // 2
        delta[:, :, above : above + down * size, before : before + along * size] = tiles * (bits[:, :-1] * 2 - 1)
        scaled = delta.flatten(1) / lengths(delta.flatten(1)).clamp_min(1e-12) * threat.radius
        return threat.project(x, x + scaled.view_as(x))

    def reached(self, state: State) -> Tensor:
        """Return how many of its queries are behind each row (N,), asked or passed over."""
        return state["restart"] * (self.queries + 1) + state["step"]

    def passes(self) -> tuple[int, int]:
        """Return the most (forwards, backwards) one row can cost: what it does if no answer is known."""
        return self.restarts * (self.queries + 1), 0


def square(setup: Setup, *, queries: int = 5000, p_init: float = 0.8, restarts: int = 1) -> Square:
    """Make the square attack on the margin; ``queries`` proposals after the start, so at most queries + 1 forwards."""
    return Square(setup, queries=queries, p_init=float(p_init), restarts=restarts)
