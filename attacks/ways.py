"""Ways for a step to go other than straight along the gradient: feasible, tangential, in unbounded coordinates.

Row by row, like ``steps``; sums and powers in float64, rounded once, because float32 differs between code paths.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arena.threat import Threat

from .steps import TINY, lengths, rows

#: Largest |tanh|: beyond it the way back to a coordinate, and the slope there, are lost.
NEAR = 1 - 1e-6
#: Length of a step in unbounded coordinates, for a step as long as the radius.
REACH = 4.0


def feasible(point: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient without the entries that push a pixel out of the box it already touches.

    What is left is normalised afterwards, so the step's length is spent on pixels that can move.
    """
    stuck = ((point <= 0) & (grad < 0)) | ((point >= 1) & (grad > 0))
    return grad.masked_fill(stuck, 0.0)


def tangent(point: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient without its part along brightness and contrast, in each channel: what x and 1 span.

    Both, because a model's own input scaling decides what it takes for the image's zero. A gradient aligned with the
    image pushes saturated pixels out of the box and leaves the rest as it was (papers.md 9.5).
    """
    flat, g = point.double().flatten(2), grad.double().flatten(2)
    g = torch.nan_to_num(g, nan=0.0, posinf=0.0, neginf=0.0)
    way = flat - flat.mean(2, keepdim=True)
    g = g - g.mean(2, keepdim=True)
    share = (g * way).sum(2, keepdim=True) / way.square().sum(2, keepdim=True).clamp_min(TINY)
    return (g - share * way).to(grad.dtype).view_as(grad)


def climb_unbounded(threat: Threat, x: Tensor, point: Tensor, grad: Tensor, size: float) -> Tensor:
    """Step in the coordinates w of x' = middle + half tanh(w), which has no walls; returns the projected point.

    Middle and half-width are those of the box cut with the ball (L2: with the cube around it). The step goes along the
    gradient by w with length ``REACH`` sqrt(pixels) a radius; unlike a sign step it keeps the gradient's proportions.
    """
    r = threat.radius
    low, high = (x.double() - r).clamp_min(0), (x.double() + r).clamp_max(1)
    middle, half = (low + high) / 2, ((high - low) / 2).clamp_min(TINY)
    t = ((point.double() - middle) / half).clamp(-NEAR, NEAR)
    slope = torch.nan_to_num(grad.double(), nan=0.0, posinf=0.0, neginf=0.0) * half * (1 - t.square())
    flat = slope.flatten(1)
    flat = flat / flat.abs().amax(1, keepdim=True).clamp_min(1e-300)
    length = REACH * size / max(r, TINY) * flat.shape[1] ** 0.5
    w = torch.atanh(t) + (flat / lengths(flat).clamp_min(TINY)).view_as(slope) * length
    moved = middle + half * torch.tanh(w)
    still = rows(flat.abs().amax(1) == 0, point)
    return threat.project(x, point.where(still, moved.to(point.dtype)))
