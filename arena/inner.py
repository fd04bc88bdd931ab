"""Training's inner attack: projected gradient ascent on a given objective, with the model in eval mode.

Kept apart from the attacks that judge defenses: what a recipe trains against is part of the recipe and must not change
when an attack gets better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from arena.errors import ArenaError
from arena.threat import Threat

#: Norms under which ``ascend`` can step.
NORMS = ("Linf", "L2")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode and give every module its own mode back afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def check_norm(owner: str, threat: Threat) -> None:
    """Refuse a threat model that the inner attack cannot follow.

    Raises:
        ArenaError: the norm is neither Linf nor L2.
    """
    if threat.norm not in NORMS:
        raise ArenaError(
            f"{owner}: adversarial training knows {' and '.join(NORMS)}, got {threat.norm}; "
            "train under one of them and attack the weights with --checkpoint"
        )


def start_point(x: Tensor, threat: Threat, start: str, generator: torch.Generator) -> Tensor:
    """Return the first iterate: ``uniform`` in the ball, ``normal`` (x + 0.001 N(0, 1)) or ``none`` (x itself)."""
    if start == "none":
        return x
    if start == "normal":
        return threat.project(x, x + 0.001 * torch.randn(x.shape, generator=generator, device=x.device))
    if start != "uniform":
        raise ValueError(f"start '{start}': expected uniform, normal or none")
    if threat.norm == "Linf":
        noise = torch.rand(x.shape, generator=generator, device=x.device) * 2 - 1
        return threat.project(x, x + threat.radius * noise)
    direction = torch.randn(x.shape, generator=generator, device=x.device).flatten(1)
    length = torch.rand(len(x), 1, generator=generator, device=x.device) ** (1 / direction.shape[1])
    unit = direction / direction.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return threat.project(x, x + (threat.radius * length * unit).view_as(x))


def ascend(
    objective: Callable[[Tensor], Tensor],
    x: Tensor,
    threat: Threat,
    *,
    steps: int,
    step: float,
    start: str = "uniform",
    generator: torch.Generator,
) -> Tensor:
    """Raise ``objective`` (points (N, C, H, W) -> values (N,)) by signed (Linf) or normalised (L2) gradient steps.

    ``step`` is in pixels of 1. The final iterate is returned, detached, inside ball and box, as the papers train.
    The caller puts the model in eval mode.
    """
    point = start_point(x, threat, start, generator)
    for _ in range(steps):
        point = point.detach().requires_grad_()
        (grad,) = torch.autograd.grad(objective(point).sum(), point)
        with torch.no_grad():
            point = threat.project(x, point + step * direction(grad, threat.norm))
    return point.detach()


def direction(grad: Tensor, norm: str) -> Tensor:
    """Return the steepest step of unit size under ``norm`` (Linf or L2), shape of ``grad``."""
    if norm == "Linf":
        return grad.sign()
    length = grad.flatten(1).norm(dim=1).clamp_min(1e-12)
    return grad / length.view(-1, *[1] * (grad.dim() - 1))


def step_of(threat: Threat, fraction: str) -> float:
    """Return a step given as a fraction of eps (``1/4``), in pixels of 1."""
    from fractions import Fraction

    return math.prod((threat.radius, float(Fraction(fraction))))
