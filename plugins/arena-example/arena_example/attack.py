"""``flips``: a random search over the corners of the Linf ball, as an ask/tell attack.

All that belongs to a row lives in the state, whose tensors begin with the rows; rows at different steps share a batch.
Random numbers come from the setup's stream, by data-set index and step, so outcomes depend on no batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arena.attack import Answer, Query, Setup, State


class Flips:
    """Change the sides of a few pixels at a time; keep the change when the margin max_{k != y} z_k - z_y grows."""

    def __init__(self, setup: Setup, *, queries: int = 200, share: float = 0.1) -> None:
        self.setup, self.queries, self.share = setup, queries, share

    def _corner(self, x: Tensor, sides: Tensor) -> Tensor:
        return self.setup.threat.project(x, x + self.setup.threat.radius * sides)

    def start(self, index: Tensor, x: Tensor, y: Tensor, clean: Tensor) -> State:
        """Begin each row at a random corner."""
        sides = (self.setup.stream.uniform(index, 0, self.setup.shape) < 0.5).to(x.dtype) * 2 - 1
        return {
            "sides": sides,
            "trial": sides,
            "value": torch.full(y.shape, -torch.inf, device=x.device),
            "step": torch.zeros_like(y),
            "best": x.clone(),
            "done": torch.zeros_like(y, dtype=torch.bool),
        }

    def ask(self, state: State) -> Query:
        """Ask for the margin at the trial corner; no gradient."""
        return Query(self._corner(state["x"], state["trial"]).unsqueeze(1), objective="margin")

    def tell(self, state: State, answer: Answer) -> State:
        """Keep the trial if it is better, stop where it breaks, else flip other pixels."""
        value = answer.values[:, 0]
        better = (value > state["value"])[:, None, None, None]
        sides = state["trial"].where(better, state["sides"])
        step = state["step"] + 1
        flip = self.setup.stream.uniform(state["index"], step, self.setup.shape) < self.share
        return {
            **state,
            "sides": sides,
            "trial": torch.where(flip, -sides, sides),
            "value": torch.maximum(value, state["value"]),
            "step": step,
            "best": self._corner(state["x"], sides),
            "done": (answer.logits[:, 0].argmax(1) != state["y"]) | (step >= self.queries),
        }

    def passes(self) -> tuple[int, int]:
        """Return the most (forwards, backwards) one row can cost."""
        return self.queries, 0
