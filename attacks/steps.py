"""What the gradient attacks share: which scores they climb, where they start, how they step. All of it row by row.

Nothing here may depend on which rows share a batch, so only row-wise operations are used, and fused forms
(``add(alpha=...)``, ``lerp``) are avoided: their vector and scalar paths round differently.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arena.attack import SURE, Answer, Setup
from arena.threat import Threat

#: Keeps a direction of zero length at zero.
TINY = 1e-12


def one_hot(setup: Setup, head: str) -> Tensor | None:
    """Return objective weights (terms,) that read only ``head``; None for the logits, where no weights are needed.

    Raises:
        Unsupported: the surface has no such head.
    """
    term = setup.term(head)
    if term == 0:
        return None
    weights = torch.zeros(setup.terms)
    weights[term] = 1.0
    return weights


def spread(weights: Tensor | None, like: Tensor) -> Tensor | None:
    """Repeat weights (terms,) for every row of ``like`` (N, ...)."""
    return None if weights is None else weights.to(like.device).expand(like.shape[0], -1)


def ranked(scores: Tensor, y: Tensor, count: int) -> Tensor:
    """Return the ``count`` highest wrong classes of ``scores`` (N, K), best first, (N, count) int64."""
    hidden = scores.scatter(1, y.view(-1, 1), -torch.inf)
    return hidden.sort(dim=1, descending=True, stable=True).indices[:, :count]


def nearly(radius: float) -> float:
    """Return a radius a little larger, within which no rounding hides a point of the ball."""
    return radius * 1.001 + 1e-5


def wrong(answer: Answer) -> Tensor:
    """Tell which rows the model misclassifies at their first point, bool (N,); random models, at most draws."""
    return answer.errors[:, 0] >= SURE


def rows(mask: Tensor, like: Tensor) -> Tensor:
    """View a mask or a number per row (N,) so that it broadcasts over ``like`` (N, ...)."""
    return mask.view(-1, *(1,) * (like.dim() - 1))


def taken(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Return the rows of ``new`` that a mask (N,) means, and of ``old`` (both (N, ...)) the others.

    On a CPU, where it means all or none, without a copy: so neither may be changed in place any more.
    """
    if not mask.is_cuda:
        if bool(mask.all()):
            return new
        if not bool(mask.any()):
            return old
    return new.where(rows(mask, new), old)


def some(mask: Tensor) -> bool:
    """Tell whether a mask (N,) means any row. On a GPU always: to wait for the answer costs more than to go on."""
    return mask.is_cuda or bool(mask.any())


def lengths(flat: Tensor) -> Tensor:
    """L2 norm of each row of (N, D), shape (N, 1); vector_norm is equal for one row and for many."""
    return torch.linalg.vector_norm(flat, dim=1, keepdim=True)


def ascend(threat: Threat, point: Tensor, grad: Tensor, size: Tensor | float) -> Tensor:
    """Step of ``size`` (a number, or one per row that broadcasts) along the steepest ascent direction of the norm.

    A gradient that is not finite counts as zero in those pixels.
    """
    grad = torch.nan_to_num(grad, nan=0.0, posinf=0.0, neginf=0.0)
    if threat.norm == "Linf":  # the product is exact, so here the fused forms round once too
        sign = grad.sign_()
        if isinstance(size, Tensor):
            return torch.addcmul(point, sign, size, out=sign)
        return torch.add(point, sign, alpha=size, out=sign)
    unit = grad.flatten(1)
    # the largest entry first: squares of a gradient as small as 1e-25 would vanish in float32
    unit = unit / unit.abs().amax(1, keepdim=True).clamp_min(1e-37)
    return point + (unit / lengths(unit).clamp_min(TINY)).view_as(grad) * size


def inside_start(setup: Setup, index: Tensor, restart: Tensor | int, x: Tensor) -> Tensor:
    """Draw a start uniformly from the ball, cut to the box: pgd's start."""
    threat = setup.threat
    if threat.norm == "Linf":
        noise = setup.stream.uniform(index, 0, setup.shape, restart).mul_(2).sub_(1)
        return threat.project(x, noise.mul_(threat.radius).add_(x))
    size = x[0].numel()
    direction = setup.stream.normal(index, 0, setup.shape, restart).flatten(1)
    # in float64 and rounded once: float32 powers differ between vector and scalar code paths
    reach = setup.stream.uniform(index, 1, (1,), restart).double().pow(1.0 / size).float() * threat.radius
    return threat.project(x, x + (direction / lengths(direction).clamp_min(TINY) * reach).view_as(x))


def surface_start(setup: Setup, index: Tensor, restart: Tensor | int, x: Tensor) -> Tensor:
    """Draw a start on the ball's surface, cut to the box: AutoAttack's start.

    Linf: uniform noise divided by its own largest entry; L2: a normal direction of length eps.
    """
    threat = setup.threat
    if threat.norm == "Linf":
        noise = setup.stream.uniform(index, 0, setup.shape, restart).flatten(1) * 2 - 1
        noise = noise / noise.abs().amax(1, keepdim=True).clamp_min(TINY)
    else:
        noise = setup.stream.normal(index, 0, setup.shape, restart).flatten(1)
        noise = noise / lengths(noise).clamp_min(TINY)
    return threat.project(x, x + noise.view_as(x) * threat.radius)
