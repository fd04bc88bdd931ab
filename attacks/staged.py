"""Targeted Auto-PGD that looks at every target for a few steps and spends the rest where it may pay: apgd_s.

Most passes of an attack go to points that never fall. A short run on each target tells how far a point is from falling
to it and how fast it comes nearer; only targets within reach get a long run, the nearest first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arena.attack import Answer, Setup, State

from .apgd import Apgd


class Staged(Apgd):
    """Auto-PGD on the targeted DLR: a short run on each target, then long runs on the most promising.

    A row's gap to a target is how much the loss lacks to zero at the best point of the short run, its gain how much
    that run won. A target is within reach where gap <= hope * gain. What a row does depends on itself alone.
    """

    def __init__(self, setup: Setup, *, targets: int, look: int, steps: int, keep: int, hope: float) -> None:
        super().__init__(setup, loss="dlr_targeted", steps=steps, restarts=1, rho=0.75, head="logits", targets=targets)
        self.look = min(look, steps)
        self.keep = min(keep, self.targets)
        self.hope = hope
        self.runs = self.targets + self.keep

    def start(self, index: Tensor, x: Tensor, y: Tensor, clean: Tensor) -> State:
        """Begin rows at the highest wrong class of the clean image."""
        state = super().start(index, x, y, clean)
        far = torch.full((len(y), self.targets), torch.inf, device=x.device)
        return {**state, "begun": state["top"].clone(), "gap": far, "gain": torch.zeros_like(far)}

    def tell(self, state: State, answer: Answer) -> State:
        """Note where each run begins, then digest as Auto-PGD does."""
        begun = answer.values[:, 0].where(state["step"] == 0, state["begun"])
        return super().tell({**state, "begun": begun}, answer)

    def _target(self, state: State) -> Tensor:
        run = state["run"]
        later = (run - self.targets).clamp(0, self.keep - 1)
        place = torch.where(run < self.targets, run, self._order(state).gather(1, later.view(-1, 1)).squeeze(1))
        return state["targets"].gather(1, place.view(-1, 1)).squeeze(1)

    def _ended(self, state: State) -> Tensor:
        steps = torch.where(state["run"] < self.targets, self.look, self.steps)
        return state["step"] >= steps

    def _last(self, state: State) -> Tensor:
        within = self._within(state).sum(1).clamp_max(self.keep)
        return state["run"] + 1 >= self.targets + within

    def _close(self, new: State, point: Tensor, broken: Tensor, ended: Tensor) -> None:
        short = ended & (new["run"] < self.targets)
        if short.any():
            here = torch.nn.functional.one_hot(new["run"].clamp_max(self.targets - 1), self.targets).bool()
            here &= short.unsqueeze(1)
            new["gap"] = torch.where(here, -new["peak_value"].unsqueeze(1), new["gap"])
            new["gain"] = torch.where(here, (new["peak_value"] - new["begun"]).unsqueeze(1), new["gain"])
        super()._close(new, point, broken, ended)

    def _within(self, state: State) -> Tensor:
        """Tell (N, T) which targets are within reach."""
        return state["gap"] <= self.hope * state["gain"]

    def _order(self, state: State) -> Tensor:
        """Return the places (N, T) of the targets, those within reach first, the nearest in gap before the others."""
        return torch.argsort(state["gap"].masked_fill(~self._within(state), torch.inf), dim=1, stable=True)

    def passes(self) -> tuple[int, int]:
        """Return the most (forwards, backwards) one row can cost."""
        most = self.targets * (self.look + 1) + self.keep * (self.steps + 1)
        return most, most


def apgd_s(
    setup: Setup, *, targets: int = 9, look: int = 7, steps: int = 30, keep: int = 3, hope: float = 1.0
) -> Staged:
    """Make staged targeted Auto-PGD; below 4 classes its loss is the targeted margin, as ``apgd_t`` has it."""
    return Staged(setup, targets=targets, look=look, steps=steps, keep=keep, hope=float(hope))
