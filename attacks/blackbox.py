"""Attacks that need no gradient, as checks on those that do: finite differences of scores (nes), labels alone (rays).

Where one of them breaks points that gradient attacks leave standing, the gradients mislead.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from arena.attack import Answer, Query, Setup, State

from .pgd import Pgd
from .steps import TINY, lengths, nearly, rows, wrong


class Nes(Pgd):
    """PGD on gradients estimated from differences of the margin at pairs of points (Ilyas et al. 2018, section 3.1)."""

    def __init__(self, setup: Setup, *, pairs: int, sigma: float, **how: object) -> None:
        super().__init__(setup, **how)  # type: ignore[arg-type]
        self.pairs, self.sigma = pairs, sigma

    def _directions(self, state: State) -> Tensor:
        shape = (self.pairs, *self.setup.shape)
        # the start points use the same stream with step 0
        return self.setup.stream.normal(state["index"], state["step"] + 2, shape, state["restart"])

    def ask(self, state: State) -> Query:
        """Ask for the margin at the point and at pairs of points around it."""
        way = self._directions(state) * self.sigma
        point = state["point"].unsqueeze(1)
        return Query(torch.cat((point, point + way, point - way), 1), self.loss)

    def tell(self, state: State, answer: Answer) -> State:
        """Step along the estimate."""
        values = answer.values.double()
        rise = (values[:, 1 : self.pairs + 1] - values[:, self.pairs + 1 :]) / (2 * self.sigma * self.pairs)
        way = self._directions(state).double()
        grad = (rise.view(*rise.shape, 1, 1, 1) * way).sum(1).to(answer.values.dtype)
        return super().tell(
            state, Answer(answer.values[:, :1], grad.unsqueeze(1), answer.logits[:, :1], answer.errors[:, :1])
        )

    def passes(self) -> tuple[int, int]:
        """Return the most (forwards, backwards) one row can cost."""
        return self.restarts * (self.steps + 1) * (2 * self.pairs + 1), 0


def nes(
    setup: Setup,
    *,
    pairs: int = 32,
    sigma: float = 0.01,
    steps: int = 20,
    step: float | Fraction = Fraction(1, 4),
    restarts: int = 1,
    loss: str = "margin",
) -> Nes:
    """Make PGD on finite differences along ``pairs`` random directions, ``sigma`` long on each pixel."""
    return Nes(setup, pairs=pairs, sigma=float(sigma), steps=steps, step=step, restarts=restarts, loss=loss)


#: A search along a direction ends when the radius is known this well, as a share of eps.
FINE = 0.02


class Rays:
    """Find the direction of +-1 along which the nearest wrong label lies, by flipping blocks of signs.

    Chen & Gu, KDD 2020 (arXiv 2006.12792). A direction better than the best so far is one whose label is wrong already
    at the best radius; only then its own radius is searched for, by halving. Blocks are halved when all were tried.
    """

    def __init__(self, setup: Setup, *, queries: int) -> None:
        self.setup = setup
        self.queries = queries
        self.size = setup.shape[0] * setup.shape[1] * setup.shape[2]
        # at this radius every pixel can reach the far face of the box
        self.widest = 1.0 if setup.threat.norm == "Linf" else self.size**0.5

    def start(self, index: Tensor, x: Tensor, y: Tensor, clean: Tensor) -> State:
        """Begin rows with random signs, at the largest radius."""
        zero = torch.zeros_like(y)
        signs = (self.setup.stream.uniform(index, 0, self.setup.shape) > 0.5).to(x.dtype) * 2 - 1
        widest = torch.full((len(y),), self.widest, device=x.device)
        return {
            "signs": signs,  # of the best direction
            "radius": widest,  # at which it is wrong, or the largest
            "tried": signs.clone(),
            "low": torch.zeros_like(widest),
            "high": widest.clone(),
            "searching": torch.zeros_like(y, dtype=torch.bool),
            "level": zero,
            "block": zero - 1,  # -1: the first direction itself
            "query": zero.clone(),
            "best": x.clone(),
            "done": torch.zeros_like(y, dtype=torch.bool),
        }

    def _at(self, state: State, radius: Tensor) -> Tensor:
        way = state["tried"]
        if self.setup.threat.norm != "Linf":
            way = way / self.size**0.5
        return (state["x"] + way * rows(radius, way)).clamp(0, 1)

    def _asked(self, state: State) -> Tensor:
        """Return the radius (N,) in question."""
        middle = (state["low"] + state["high"]) / 2
        return middle.where(state["searching"], state["radius"])

    def ask(self, state: State) -> Query:
        """Ask for the label at the radius in question."""
        return Query(self._at(state, self._asked(state)).unsqueeze(1))

    def counts(self, state: State) -> Tensor:
        """Tell (N,) which points lie in the ball, or as good as: farther out a mistake ends nothing."""
        return self._asked(state) <= nearly(self.setup.threat.radius)

    def tell(self, state: State, answer: Answer) -> State:
        """Halve the search, or take the direction up, or try the next one."""
        found, searching, eps = wrong(answer), state["searching"], self.setup.threat.radius
        middle = (state["low"] + state["high"]) / 2
        high = middle.where(searching & found, state["high"])
        low = middle.where(searching & ~found, state["low"])
        begins = ~searching & found
        high, low = state["radius"].where(begins, high), low.masked_fill(begins, 0.0)
        searching = (searching | begins) & (high - low > FINE * max(eps, TINY)) & (high > eps)
        better = (state["searching"] | begins) & (high <= state["radius"])
        radius = high.where(better, state["radius"])
        signs = state["tried"].where(rows(better, state["tried"]), state["signs"])

        block, level = state["block"] + ~searching, state["level"]
        over = block >= 2**level
        level = level + over
        level = level.masked_fill(2**level > self.size, 0)
        block = block.masked_fill(over, 0)
        length = -(-self.size // 2**level)
        place = torch.arange(self.size, device=block.device)
        inside = (place // length.unsqueeze(1)) == block.unsqueeze(1)
        flipped = torch.where(inside.view_as(signs), -signs, signs)
        tried = state["tried"].where(rows(searching, signs), flipped)

        query = state["query"] + 1
        done = (radius <= eps) | (query >= self.queries)
        new = {**state, "signs": signs, "radius": radius, "tried": tried, "low": low, "high": high}
        new |= {"searching": searching, "level": level, "block": block, "query": query, "done": done}
        # up to eps along the best direction: there a break is, or is nearest
        way = signs if self.setup.threat.norm == "Linf" else signs / lengths(signs.flatten(1)).view(-1, 1, 1, 1)
        reach = self.setup.threat.project(state["x"], state["x"] + way * rows(radius.clamp_max(eps), way))
        new["best"] = reach.where(rows(done, reach), state["best"])
        return new

    def passes(self) -> tuple[int, int]:
        """Return the most (forwards, backwards) one row can cost."""
        return self.queries, 0


def rays(setup: Setup, *, queries: int = 1000) -> Rays:
    """Make RayS: labels alone, one a query."""
    return Rays(setup, queries=queries)
