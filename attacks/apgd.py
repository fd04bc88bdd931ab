"""Auto-PGD: apgd_ce, apgd_dlr and the targeted apgd_t.

Croce & Hein, ICML 2020 (arXiv 2003.01690), algorithm 1, with the settings of the standard AutoAttack. Every row has its
own step size, checkpoints, restart and target, so rows at any stage share a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arena.attack import Answer, Query, Setup, State

from .steps import ascend, one_hot, ranked, rows, some, spread, surface_start, taken, wrong

MOMENTUM = 0.75
#: First step as a multiple of eps.
FIRST_STEP = 2.0


def checkpoints(steps: int) -> list[tuple[int, int]]:
    """Return (iteration, length of the window before it) of each checkpoint in a run of ``steps``.

    Windows start at 22 % of the run, shrink by 3 % each, down to 6 %: 22, 41, 57, 70, 80, 87, 93, 99 of 100.
    """
    window, shrink, floor = (max(int(share * steps), 1) for share in (0.22, 0.03, 0.06))
    found, at = [], 0
    while (at := at + window) <= steps:
        found.append((at, window))
        window = max(window - shrink, floor)
    return found


class Apgd:
    """Gradient ascent with momentum that halves its step and returns to its best point when it stalls.

    A run is the start and ``steps`` iterations, each one forward and one backward; the runs of a row are its targets
    one after the other, each with its restarts.
    """

    def __init__(
        self,
        setup: Setup,
        *,
        loss: str,
        steps: int,
        restarts: int,
        rho: float,
        head: str,
        targets: int = 0,
        weights: Tensor | None = None,
        heads_loss: str | None = None,
    ) -> None:
        self.setup = setup
        self.loss = loss
        self.steps = steps
        self.restarts = restarts
        self.term = setup.term(head)
        self.weights = one_hot(setup, head) if weights is None else weights
        self.heads_loss = heads_loss
        self.targets = min(targets, setup.n_classes - 1)
        self.runs = restarts * max(self.targets, 1)
        # by iteration: the most rises that still count as stalling, -1 where there is no checkpoint
        self.limit = torch.full((steps + 1,), -1.0)
        for at, window in checkpoints(steps):
            self.limit[at] = rho * window

    def start(self, index: Tensor, x: Tensor, y: Tensor, clean: Tensor) -> State:
        """Begin rows on the ball's surface; a targeted attack ranks the wrong classes by the clean scores."""
        zero = torch.zeros(x.shape[0], device=x.device)
        lowest = torch.full_like(zero, -torch.inf)
        off = torch.zeros_like(y, dtype=torch.bool)
        point = surface_start(self.setup, index, 0, x)
        state = {
            "point": point,
            "before": point.clone(),  # the iterate before `point`
            "peak": point.clone(),  # best of this run
            "peak_grad": torch.zeros_like(x),
            "peak_value": lowest,
            "checked_value": lowest.clone(),  # peak_value at the last checkpoint
            "last_value": lowest.clone(),
            "rises": zero,  # since the last checkpoint
            "halved": off,  # at the last checkpoint
            "size": torch.full_like(zero, FIRST_STEP * self.setup.threat.radius),
            "step": torch.zeros_like(y),
            "run": torch.zeros_like(y),
            "best": x.clone(),
            "top": lowest.clone(),
            "done": off.clone(),
        }
        if self.targets:
            state["targets"] = ranked(clean[:, self.term], y, self.targets)
        return state

    def ask(self, state: State) -> Query:
        """Ask for the objective and its gradient at the newest iterate."""
        return Query(
            points=state["point"].unsqueeze(1),
            objective=self.loss,
            weights=spread(self.weights, state["y"]),
            target=self._target(state),
            grad=True,
            heads_objective=self.heads_loss,
        )

    def tell(self, state: State, answer: Answer) -> State:
        """Note the iterate, review the step size at checkpoints, and step."""
        assert answer.grad is not None
        point, grad, value = state["point"], answer.grad[:, 0], answer.values[:, 0]
        step = state["step"]
        first = step == 0
        broken = wrong(answer)

        better = value > state["peak_value"]
        peak, peak_grad = taken(better, point, state["peak"]), taken(better, grad, state["peak_grad"])
        peak_value = value.where(better, state["peak_value"])
        rises = state["rises"] + ((value > state["last_value"]) & ~first)
        size, halved, checked = state["size"], state["halved"], state["checked_value"]
        begun = some(first)
        if begun:
            checked = peak_value.where(first, checked)

        here, from_grad = point, grad
        self.limit = self.limit.to(point.device)
        limit = self.limit[step]
        due = limit >= 0
        if some(due):
            # algorithm 1, conditions 1 and 2: too few rises, or no new best since a checkpoint that did not halve
            stalled = (rises <= limit) | (~halved & (checked >= peak_value))
            stalled &= due
            size = torch.where(stalled, size / 2, size)
            here, from_grad = peak.where(rows(stalled, point), point), peak_grad.where(rows(stalled, point), grad)
            halved = stalled.where(due, halved)
            checked = peak_value.where(due, checked)
            rises = rises.masked_fill(due, 0.0)

        threat, x = self.setup.threat, state["x"]
        ahead = threat.project(x, ascend(threat, here, from_grad, rows(size, point)))
        drift = (ahead - here).mul_(MOMENTUM).add_(here).add_((here - state["before"]).mul_(1 - MOMENTUM))
        moved = threat.project(x, drift)
        if begun:
            moved = ahead.where(rows(first, point), moved)

        new = {
            **state,
            "point": moved,
            "before": here,
            "peak": peak,
            "peak_grad": peak_grad,
            "peak_value": peak_value,
            "checked_value": checked,
            "last_value": value,
            "rises": rises,
            "halved": halved,
            "size": size,
            "step": step + 1,
        }
        ended = self._ended(state)
        if (ended | broken).any():
            self._close(new, point, broken, ended)
        return new

    def _target(self, state: State) -> Tensor | None:
        """Return the class (N,) that each row's run aims at."""
        if not self.targets:
            return None
        place = (state["run"] // self.restarts).clamp_max(self.targets - 1)
        return state["targets"].gather(1, place.view(-1, 1)).squeeze(1)

    def _ended(self, state: State) -> Tensor:
        """Tell (N,) whose run ends with the iterate just seen."""
        return state["step"] >= self.steps

    def _last(self, state: State) -> Tensor:
        """Tell (N,) for whom no run follows."""
        return state["run"] + 1 >= self.runs

    def _close(self, new: State, point: Tensor, broken: Tensor, ended: Tensor) -> None:
        """Hand over the best point of rows whose run ends, and begin their next run."""
        improved = (new["peak_value"] > new["top"]) & ended
        new["best"] = taken(broken, point, taken(improved, new["peak"], new["best"]))
        new["top"] = new["peak_value"].where(improved, new["top"])
        new["done"] = broken | (ended & self._last(new))
        again = ended & ~new["done"]
        if not again.any():
            return
        new["run"] = new["run"] + again
        fresh = surface_start(self.setup, new["index"], new["run"], new["x"])
        wide = rows(again, point)
        for key in ("point", "before"):
            new[key] = fresh.where(wide, new[key])
        for key in ("peak_value", "checked_value", "last_value"):
            new[key] = new[key].masked_fill(again, -torch.inf)
        new["rises"] = new["rises"].masked_fill(again, 0.0)
        new["size"] = new["size"].masked_fill(again, FIRST_STEP * self.setup.threat.radius)
        new["step"] = new["step"].masked_fill(again, 0)
        new["halved"] = new["halved"] & ~again

    def passes(self) -> tuple[int, int]:
        """Return the most (forwards, backwards) one row can cost."""
        return self.runs * (self.steps + 1), self.runs * (self.steps + 1)


def apgd_ce(setup: Setup, *, steps: int = 100, restarts: int = 1, rho: float = 0.75, head: str = "logits") -> Apgd:
    """Make APGD on the cross-entropy."""
    return Apgd(setup, loss="ce", steps=steps, restarts=restarts, rho=float(rho), head=head)


def apgd_dlr(setup: Setup, *, steps: int = 100, restarts: int = 1, rho: float = 0.75, head: str = "logits") -> Apgd:
    """Make APGD on the difference of logits ratio; the margin below 3 classes, where it is undefined."""
    return Apgd(setup, loss="dlr", steps=steps, restarts=restarts, rho=float(rho), head=head)


def apgd_t(
    setup: Setup,
    *,
    targets: int = 9,
    steps: int = 100,
    restarts: int = 1,
    rho: float = 0.75,
    head: str = "logits",
) -> Apgd:
    """Make APGD on the targeted DLR, for the ``targets`` highest wrong classes of the clean image, one after the other.

    At most K - 1 targets; below 4 classes, where the targeted DLR is undefined, the targeted margin.
    """
    return Apgd(
        setup,
        loss="dlr_targeted",
        steps=steps,
        restarts=restarts,
        rho=float(rho),
        head=head,
        targets=targets,
    )
