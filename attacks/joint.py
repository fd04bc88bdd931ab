"""Targeted attacks on heads and logits together: all at once (joint_t), or one after the other (steer).

papers.md 9.1, attacks 2 and 3. Every term is a lead over its own spread of scores, so no head drowns the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arena.attack import Answer, Query, Setup, State, Unsupported
from arena.objectives import ENOUGH, best_other, lead

from .apgd import Apgd
from .steps import ascend, inside_start, ranked, rows, taken, wrong


def joint_t(setup: Setup, *, weights: str = "all", targets: int = 9, steps: int = 100, restarts: int = 1) -> Apgd:
    """Make Auto-PGD on the sum over heads and logits of the target's lead, for each of the nearest wrong classes.

    ``weights``: ``first`` the first head alone; ``order`` each head half of the one before, the logits last; ``all``
    the same for all. A head that leads enough counts no further.

    Raises:
        Unsupported: the surface declares no heads.
    """
    heads = setup.terms - 1
    if heads == 0:
        raise Unsupported("joint_t needs heads; the surface declares none")
    w = torch.ones(setup.terms)
    if weights == "first":
        w = torch.zeros(setup.terms)
        w[1] = 1.0
    elif weights == "order":
        w = torch.tensor([0.5**heads, *(0.5**g for g in range(heads))])
    return Apgd(
        setup,
        loss="lead",
        heads_loss="lead" if weights == "first" else "lead_enough",
        steps=steps,
        restarts=restarts,
        rho=0.75,
        head=next(iter(setup.surface.heads)),
        targets=targets,
        weights=w,
    )


class Steer:
    """Flip the first head to a target, then the next while holding it, and at last push the logits.

    A row is in phase p: heads up to p count, the last of them is being flipped; after the last head the logits count
    too. A held head costs nothing while it leads enough. Targets are tried one after the other.
    """

    def __init__(self, setup: Setup, *, targets: int, steps: int, step: float, restarts: int) -> None:
        self.setup = setup
        self.heads = setup.terms - 1
        if self.heads == 0:
            raise Unsupported("steer needs heads; the surface declares none")
        self.targets = min(targets, setup.n_classes - 1)
        self.steps, self.restarts = steps, restarts
        self.runs = self.targets * restarts
        # long steps first, short ones last
        self.sizes = torch.tensor([step * setup.threat.radius * max(1 - k / steps, 0.1) for k in range(steps + 1)])

    def start(self, index: Tensor, x: Tensor, y: Tensor, clean: Tensor) -> State:
        """Begin rows at the first head's highest wrong class."""
        n, zero = len(y), torch.zeros_like(y)
        return {
            "point": inside_start(self.setup, index, 0, x),
            "targets": ranked(clean[:, 1], y, self.targets),
            "step": zero,
            "run": zero.clone(),
            "phase": zero.clone(),
            "best": x.clone(),
            "top": torch.full((n,), -torch.inf, device=x.device),
            "done": torch.zeros(n, dtype=torch.bool, device=x.device),
        }

    def _target(self, state: State) -> Tensor:
        place = (state["run"] // self.restarts).clamp_max(self.targets - 1)
        return state["targets"].gather(1, place.view(-1, 1)).squeeze(1)

    def ask(self, state: State) -> Query:
        """Ask for the leads of the heads up to the phase's, and in the last phase of the logits."""
        place = torch.arange(self.heads + 1, device=state["y"].device)
        counts = (place >= 1) & (place - 1 <= state["phase"].unsqueeze(1))
        counts[:, 0] = state["phase"] >= self.heads
        return Query(
            points=state["point"].unsqueeze(1),
            objective="lead",
            heads_objective="lead_enough",
            weights=counts.to(state["x"].dtype),
            target=self._target(state),
            grad=state["step"] < self.steps,
        )

    def tell(self, state: State, answer: Answer) -> State:
        """Keep the point nearest to the boundary, go on to the next phase where the head leads enough, and step."""
        assert answer.scores is not None
        point, target, phase = state["point"], self._target(state), state["phase"]
        logits = answer.logits[:, 0]
        margin = best_other(logits, state["y"]) - logits.gather(1, state["y"].view(-1, 1)).squeeze(1)
        broken = wrong(answer)
        better = broken | (margin > state["top"])
        ended = state["step"] >= self.steps
        done = broken | (ended & (state["run"] + 1 >= self.runs))

        at = (phase + 1).clamp_max(self.heads).view(-1, 1, 1).expand(-1, 1, answer.scores.shape[-1])
        here = answer.scores[:, 0].gather(1, at).squeeze(1)
        flipped = (lead(here, state["y"], target) >= ENOUGH * 0.999) & (phase < self.heads)
        phase = phase + flipped

        grad = torch.zeros_like(point) if answer.grad is None else answer.grad[:, 0]
        size = self.sizes.to(point.device)[state["step"].clamp_max(self.steps)]
        threat = self.setup.threat
        moved = threat.project(state["x"], ascend(threat, point, grad, rows(size, point)))
        step, run = state["step"] + 1, state["run"]
        again = ended & ~done
        if again.any():
            run = run + again
            step, phase = step.masked_fill(again, 0), phase.masked_fill(again, 0)
            fresh = inside_start(self.setup, state["index"], run, state["x"])
            moved = fresh.where(rows(again, point), moved)
        return {
            **state,
            "point": moved,
            "step": step,
            "run": run,
            "phase": phase,
            "best": taken(better, point, state["best"]),
            "top": margin.where(better, state["top"]),
            "done": done,
        }

    def passes(self) -> tuple[int, int]:
        """Return the most (forwards, backwards) one row can cost."""
        return self.runs * (self.steps + 1), self.runs * self.steps


def steer(setup: Setup, *, targets: int = 9, steps: int = 40, step: float = 0.25, restarts: int = 1) -> Steer:
    """Make two-phase steering.

    Raises:
        Unsupported: the surface declares no heads.
    """
    return Steer(setup, targets=targets, steps=steps, step=float(step), restarts=restarts)
