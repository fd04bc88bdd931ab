"""FAB, targeted: fab_t. Croce & Hein, ICML 2020 (arXiv 1907.02044), algorithm 1, targeted as in AutoAttack.

Looks for the nearest misclassified point by projecting onto the linearised decision boundary inside the box, pulled
towards the clean image. It keeps to no ball; a row is done as soon as a misclassified point lies within eps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arena.attack import Answer, Query, Setup, State

from .hyperplane import displacement
from .steps import TINY, lengths, nearly, ranked, rows, some, wrong


class Fab:
    """An iteration is two asks: the gradient at the iterate (phase 0), then the class of the new point (phase 1)."""

    def __init__(
        self, setup: Setup, *, targets: int, steps: int, restarts: int, alpha_max: float, eta: float, beta: float
    ) -> None:
        self.setup = setup
        self.targets = min(targets, setup.n_classes - 1)
        self.steps = steps
        self.restarts = restarts
        self.runs = self.targets * restarts
        self.alpha_max, self.eta, self.beta = alpha_max, eta, beta

    def start(self, index: Tensor, x: Tensor, y: Tensor, clean: Tensor) -> State:
        """Begin rows at the clean image, targets ranked by the clean logits."""
        off = torch.zeros_like(y, dtype=torch.bool)
        return {
            "point": x.clone(),
            "scoring": off,  # phase 1
            "step": torch.zeros_like(y),
            "run": torch.zeros_like(y),
            "targets": ranked(clean[:, 0], y, self.targets),
            "nearest": x.clone(),
            "norm": torch.full((x.shape[0],), torch.inf, device=x.device),
            "best": x.clone(),
            "done": off.clone(),
        }

    def ask(self, state: State) -> Query:
        """Ask for the gradient of z_t - z_y in phase 0, for the logits alone in phase 1."""
        place = (state["run"] // self.restarts).clamp_max(self.targets - 1)
        return Query(
            points=state["point"].unsqueeze(1),
            objective="margin_targeted",
            target=state["targets"].gather(1, place.view(-1, 1)).squeeze(1),
            grad=~state["scoring"],
        )

    def counts(self, state: State) -> Tensor:
        """Tell (N,) which points lie in the ball, or as good as: a mistake farther out ends nothing."""
        norm = self._norm((state["point"] - state["x"]).flatten(1)).squeeze(1)
        return norm <= nearly(self.setup.threat.radius)

    def tell(self, state: State, answer: Answer) -> State:
        """Step to the boundary (phase 0); keep what is misclassified and nearer, and step back (phase 1)."""
        new = dict(state)
        scoring = state["scoring"]
        scored = some(scoring)
        if answer.grad is not None:
            moved = self._to_boundary(state, answer.values[:, 0], answer.grad[:, 0])
            new["point"] = state["point"].where(rows(scoring, moved), moved) if scored else moved
        if scored:
            self._score(new, state, answer, scoring)
        new["scoring"] = ~scoring
        return new

    def _to_boundary(self, state: State, value: Tensor, grad: Tensor) -> Tensor:
        """Equations 9 and 10: mix the projections of the iterate and of the clean image, both overshot by eta."""
        point, x, norm = state["point"].flatten(1), state["x"].flatten(1), self.setup.threat.norm
        normal = torch.nan_to_num(grad.flatten(1), nan=0.0, posinf=0.0, neginf=0.0)
        value = torch.nan_to_num(value, nan=0.0, posinf=0.0, neginf=0.0)
        # one scale for the whole equation: gradients of saturated models are too small to square
        scale = normal.abs().amax(1, keepdim=True).clamp_min(1e-37)
        normal, value = normal / scale, value / scale.squeeze(1)
        here = -value
        clean = here + (normal * (point - x)).sum(1, dtype=torch.float64).float()
        both = displacement(
            norm, torch.cat((point, x)), torch.cat((normal, normal)), torch.cat((here, clean)).clamp(-1e30, 1e30)
        )
        from_point, from_clean = both.chunk(2)
        far = self._norm(from_point).clamp_min(1e-8)
        alpha = (far / (far + self._norm(from_clean).clamp_min(1e-8))).clamp(0, self.alpha_max)
        moved = (point + self.eta * from_point) * (1 - alpha) + (x + self.eta * from_clean) * alpha
        return moved.clamp(0, 1).view_as(state["x"])

    def _norm(self, flat: Tensor) -> Tensor:
        return flat.abs().amax(1, keepdim=True) if self.setup.threat.norm == "Linf" else lengths(flat)

    def _score(self, new: State, state: State, answer: Answer, scoring: Tensor) -> None:
        point, x, threat = state["point"], state["x"], self.setup.threat
        found = scoring & wrong(answer)
        norm = self._norm((point - x).flatten(1)).squeeze(1)
        nearer = found & (norm < state["norm"])
        new["nearest"] = point.where(rows(nearer, point), state["nearest"])
        new["norm"] = norm.where(nearer, state["norm"])
        within = found & (norm <= threat.radius)
        back = x + (point - x) * self.beta
        new["point"] = back.where(rows(found, point), new["point"])
        step = state["step"] + scoring
        ended = scoring & (step >= self.steps)
        run = state["run"] + ended
        done = within | (run >= self.runs)
        if done.any():
            # without any misclassified point the last iterate stands in: it leans towards the boundary
            seen = new["nearest"].where(rows(torch.isfinite(new["norm"]), point), point)
            seen = point.where(rows(within, point), seen)
            new["best"] = threat.project(x, seen).where(rows(done, point), state["best"])
        if ended.any():
            new["point"] = self._begin(new, run).where(rows(ended, point), new["point"])
        new["step"] = step.masked_fill(ended, 0)
        new["run"] = run.minimum(torch.full_like(run, self.runs - 1))
        new["done"] = done

    def _begin(self, state: State, run: Tensor) -> Tensor:
        """Start a run: at the image, or for later restarts at random within half of min(eps, smallest norm found)."""
        x = state["x"]
        again = run % self.restarts > 0
        if not again.any():
            return x
        if self.setup.threat.norm == "Linf":
            noise = self.setup.stream.uniform(state["index"], 0, self.setup.shape, run).flatten(1) * 2 - 1
        else:
            noise = self.setup.stream.normal(state["index"], 0, self.setup.shape, run).flatten(1)
        noise = (noise / self._norm(noise).clamp_min(TINY)).view_as(x)
        reach = 0.5 * state["norm"].clamp_max(self.setup.threat.radius)
        return (x + noise * rows(reach, x)).clamp(0, 1).where(rows(again, x), x)

    def passes(self) -> tuple[int, int]:
        """Return the most (forwards, backwards) one row can cost."""
        return 2 * self.runs * self.steps, self.runs * self.steps


def fab_t(
    setup: Setup,
    *,
    targets: int = 9,
    steps: int = 100,
    restarts: int = 1,
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
) -> Fab:
    """Make targeted FAB for the ``targets`` highest wrong classes of the clean image, at most K - 1."""
    return Fab(
        setup,
        targets=targets,
        steps=steps,
        restarts=restarts,
        alpha_max=float(alpha_max),
        eta=float(eta),
        beta=float(beta),
    )
