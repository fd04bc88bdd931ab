"""FAT, friendly adversarial training (Zhang et al., ICML 2020): train on images only just misclassified.

PGD stops for a row tau steps after its iterate is first misclassified, or after all steps; the loss is the
cross-entropy on what it leaves. tau rises over training from 0 to its largest value (papers.md 7).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arena.inner import direction, evaluating, start_point, step_of
from arena.specs import Value, text
from arena.stages import Adversary, Context, Usual
from arena.threat import Threat
from arena.training import Stage


def patience(epoch: int, epochs: int, most: int, schedule: str) -> int:
    """Return tau of an epoch (from 0): ``constant``, or ``rising`` through 0 ... ``most`` in equal parts."""
    if schedule == "constant":
        return most
    return min(most, (most + 1) * epoch // max(epochs, 1))


def ascend_friendly(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    tau: int,
    steps: int,
    step: float,
    generator: torch.Generator,
) -> Tensor:
    """Raise the cross-entropy from a uniform start; a row makes ``tau`` more steps once misclassified, then rests.

    The caller puts the model in eval mode. Rows at rest leave the batch. Returns (N, C, H, W), detached.
    """
    found = start_point(x, threat, "uniform", generator).detach().clone()
    left = torch.full_like(y, tau)
    rows = torch.arange(len(x), device=x.device)
    for _ in range(steps):
        point = found[rows].requires_grad_()
        logits = model(point)
        wrong = logits.argmax(1) != y[rows]
        goes = ~wrong | (left[rows] > 0)
        left[rows] -= wrong.to(left.dtype)
        if not bool(goes.any()):
            break
        (grad,) = torch.autograd.grad(F.cross_entropy(logits, y[rows], reduction="sum"), point)
        rows = rows[goes]
        with torch.no_grad():
            move = step * direction(grad[goes], threat.norm)
            found[rows] = threat.project(x[rows], found[rows] + move)
    return found


@dataclass(frozen=True)
class Friendly(Usual):
    """Cross-entropy on early-stopped adversarial images."""

    recipe: str = "sat"
    tau: int = 3
    """Most steps after the first misclassification."""
    schedule: str = "rising"
    """``rising`` from 0 to ``tau`` over training, or ``constant``."""

    def adversary(self, ctx: Context) -> Adversary | None:
        """Return early-stopped projected gradient ascent, in eval mode."""
        tau = patience(ctx.epoch, self.epochs(ctx.preset), self.tau, self.schedule)

        def attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            with evaluating(model):
                return ascend_friendly(
                    model,
                    x,
                    y,
                    ctx.threat,
                    tau=tau,
                    steps=ctx.preset.steps,
                    step=step_of(ctx.threat, ctx.preset.step_size),
                    generator=ctx.generator,
                )

        return attack


def recipe(tau: Value = 3, schedule: Value = "rising", **options: Value) -> Sequence[Stage]:
    """Friendly adversarial training."""
    return [Friendly(tau=int(tau), schedule=text(schedule))]
