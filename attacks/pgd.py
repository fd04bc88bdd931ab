"""Projected gradient descent and its kin: fgsm, pgd, cw_linf, lambda_pgd.

Madry et al., ICLR 2018 (arXiv 1706.06083); Goodfellow et al., ICLR 2015 (arXiv 1412.6572). The best iterate is kept,
and a row leaves at its first misclassified one.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from arena.attack import Answer, Query, Setup, State, Unsupported

from .steps import ascend, inside_start, one_hot, rows, spread, taken, wrong
from .ways import climb_unbounded, feasible, tangent


class Pgd:
    """Ascend an objective by steps of fixed size; see ``arena.attack.IteratedAttack``.

    A run is ``steps`` gradients and ``steps + 1`` points, the start among them; the last point is only scored.
    """

    needs_clean = False

    def __init__(
        self,
        setup: Setup,
        *,
        steps: int,
        step: float | Fraction,
        loss: str,
        restarts: int = 1,
        random_start: bool = True,
        weights: Tensor | None = None,
        draws: int = 1,
        way: str = "plain",
    ) -> None:
        if way == "box" and setup.threat.norm == "Linf":
            raise Unsupported(
                "way=box: under Linf each pixel steps by itself, so the box takes nothing from the others"
            )
        self.way = way
        self.setup = setup
        self.steps = steps
        self.size = float(step) * setup.threat.radius
        self.loss = loss
        self.restarts = restarts
        self.random_start = random_start
        self.weights = weights
        self.draws = draws

    def _begin(self, index: Tensor, restart: Tensor | int, x: Tensor) -> Tensor:
        return inside_start(self.setup, index, restart, x) if self.random_start else x.clone()

    def start(self, index: Tensor, x: Tensor, y: Tensor, clean: Tensor) -> State:
        """Begin rows at their first start point."""
        n = x.shape[0]
        return {
            "point": self._begin(index, 0, x),
            "step": torch.zeros_like(y),
            "restart": torch.zeros_like(y),
            "best": x.clone(),
            "top": torch.full((n,), -torch.inf, device=x.device),
            "done": torch.zeros(n, dtype=torch.bool, device=x.device),
        }

    def ask(self, state: State) -> Query:
        """Ask for the objective, and for its gradient unless the run ends here."""
        return Query(
            points=state["point"].unsqueeze(1),
            objective=self.loss,
            weights=spread(self.weights, state["y"]),
            grad=state["step"] < self.steps,
            draws=self.draws,
        )

    def tell(self, state: State, answer: Answer) -> State:
        """Keep the best point, step, and begin the next restart where a run ends."""
        point, value = state["point"], answer.values[:, 0]
        broken = wrong(answer)
        better = broken | (value > state["top"])
        ended = state["step"] >= self.steps
        done = broken | (ended & (state["restart"] + 1 >= self.restarts))
        grad = torch.zeros_like(point) if answer.grad is None else answer.grad[:, 0]
        moved = self._move(state, point, grad)
        step, restart = state["step"] + 1, state["restart"]
        again = ended & ~done
        if again.any():
            restart = restart + again
            step = step.masked_fill(again, 0)
            moved = self._begin(state["index"], restart, state["x"]).where(rows(again, point), moved)
        return {
            **state,
            "point": moved,
            "step": step,
            "restart": restart,
            "best": taken(better, point, state["best"]),
            "top": value.where(better, state["top"]),
            "done": done,
        }

    def _move(self, state: State, point: Tensor, grad: Tensor) -> Tensor:
        threat, x = self.setup.threat, state["x"]
        if self.way == "tanh":
            return climb_unbounded(threat, x, point, grad, self.size)
        if self.way == "tangent":
            grad = tangent(point, grad)
        elif self.way == "box":
            grad = feasible(point, grad)
        return threat.project(x, ascend(threat, point, grad, self.size))

    def passes(self) -> tuple[int, int]:
        """Return the most (forwards, backwards) one row can cost."""
        return self.restarts * (self.steps + 1) * self.draws, self.restarts * self.steps * self.draws


def fgsm(setup: Setup, *, loss: str = "ce", random_start: bool = False, head: str = "logits") -> Pgd:
    """Make the fast gradient sign method: one step of eps, and a look at where it lands (2 forwards, 1 backward)."""
    return Pgd(setup, steps=1, step=1, loss=loss, random_start=random_start, weights=one_hot(setup, head))


def pgd(
    setup: Setup,
    *,
    steps: int = 20,
    restarts: int = 1,
    loss: str = "ce",
    step: float | Fraction = Fraction(1, 4),
    random_start: bool = True,
    head: str = "logits",
    eot: int = 1,
    way: str = "plain",
) -> Pgd:
    """Make projected gradient descent; without a random start every restart is the same, so one is run."""
    return Pgd(
        setup,
        steps=steps,
        step=step,
        loss=loss,
        restarts=restarts if random_start or eot > 1 else 1,
        random_start=random_start,
        weights=one_hot(setup, head),
        draws=eot,
        way=way,
    )


def cw_linf(
    setup: Setup,
    *,
    steps: int = 30,
    restarts: int = 1,
    step: float | Fraction = Fraction(1, 4),
    head: str = "logits",
) -> Pgd:
    """Make the papers' CW-Linf, corrected: PGD on each example's own margin max_{k != y} z_k - z_y, no clamp."""
    return Pgd(setup, steps=steps, step=step, loss="margin", restarts=restarts, weights=one_hot(setup, head))


def lambda_pgd(
    setup: Setup,
    *,
    lam: float = 1.0,
    head: str = "",
    loss: str = "ce",
    steps: int = 20,
    step: float | Fraction = Fraction(1, 10),
    restarts: int = 1,
) -> Pgd:
    """Make one row of the λ_attack sweep (FGAA, table 5): loss(logits) + lam * mean over heads of loss(head).

    ``lam=0`` reads the logits only, ``lam=inf`` the heads only; with ``head`` the mean is that one head.

    Raises:
        Unsupported: the surface declares no heads, or not this one.
    """
    heads = setup.terms - 1
    if heads == 0:
        raise Unsupported("lambda_pgd needs heads; the surface declares none")
    if head == "logits":
        raise Unsupported("lambda_pgd: head=logits is lam=0; name an auxiliary head")
    aux = one_hot(setup, head)
    if aux is None:
        aux = torch.full((setup.terms,), 1.0 / heads)
        aux[0] = 0.0
    if math.isinf(lam):
        weights: Tensor | None = aux
    elif lam == 0:
        weights = None
    else:
        weights = aux * lam
        weights[0] = 1.0
    return Pgd(setup, steps=steps, step=step, loss=loss, restarts=restarts, weights=weights)
