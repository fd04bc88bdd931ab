"""Threat models: norms, balls, projection, distance, tolerance. The only place with this maths.

A threat model is untargeted, inside the box [0, 1], and a norm ball of radius ``eps`` around the image. ``eps`` is kept
as the text the user wrote (``8/255``) and as an exact fraction, so that equal questions have equal keys.
Importing this module does not import torch.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING

from arena.errors import ArenaError, unknown

if TYPE_CHECKING:
    from torch import Tensor

NORMS = ("Linf", "L2", "L1", "L0")

#: Absolute slack of the referee for Linf, in pixels of 1: float32 rounding of x + eps, never a way to gain.
LINF_SLACK = 1e-6
#: Relative slack of the referee for L2 and L1: float32 rounding of a sum over the image.
LP_SLACK = 1e-5
#: L2 radii below this are projected in float64: there float32 rounding of x + delta outweighs the slack.
FINE_L2 = 0.02


@dataclass(frozen=True)
class Threat:
    """A norm ball of radius eps around each image, cut with the box [0, 1]."""

    norm: str
    """One of ``Linf, L2, L1, L0``."""
    eps: str
    """Radius as the user wrote it, in pixels of 1 (L0: number of changed pixels values)."""

    @classmethod
    def parse(cls, norm: str, eps: str | float | int) -> Threat:
        """Check and normalise a threat model.

        Raises:
            ArenaError: unknown norm, ``eps`` that is no number or fraction, negative, or larger than the box.
        """
        by_lower = {n.lower(): n for n in NORMS}
        if norm.lower() not in by_lower:
            raise unknown("norm", norm, NORMS)
        norm = by_lower[norm.lower()]
        text = str(eps).strip().replace(" ", "")
        try:
            if re.search(r"e[+-]?\d{3}", text, re.IGNORECASE):  # Fraction would build the whole integer
                raise ValueError(text)
            value = Fraction(text)
        except (ValueError, ZeroDivisionError):
            raise ArenaError(f"eps '{eps}': expected a number or a fraction such as 8/255 or 0.03") from None
        if value < 0:
            raise ArenaError(f"eps '{eps}': expected a radius of at least 0")
        if norm == "Linf" and value > 1:
            hint = f"; images are in [0, 1], did you mean {text}/255?" if value <= 255 and "/" not in text else ""
            raise ArenaError(f"eps '{eps}': larger than the box [0, 1]{hint}")
        if norm == "L0" and value.denominator != 1:
            raise ArenaError(f"eps '{eps}': L0 counts changed values, expected a whole number")
        return cls(norm, text)

    @cached_property
    def fraction(self) -> Fraction:
        """The exact radius."""
        return Fraction(self.eps)

    @cached_property
    def radius(self) -> float:
        """The radius as a float."""
        return float(self.fraction)

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Refuse a radius that holds the whole box for images of ``shape`` (C, H, W).

        Raises:
            ArenaError: no two images of this shape are further apart than eps.
        """
        d = math.prod(shape)
        widest = {"Linf": 1.0, "L2": math.sqrt(d), "L1": float(d), "L0": float(d)}[self.norm]
        if self.radius > widest:
            raise ArenaError(f"eps '{self.eps}': larger than the box, whose {self.norm} diameter is {widest:g} here")

    # -- tensor maths; x, x_adv, delta are (N, C, H, W) -------------------------------------------------------

    def distance(self, x: Tensor, x_adv: Tensor) -> Tensor:
        """Return the distance of each row, float64, shape (N,)."""
        delta = (x_adv.double() - x.double()).flatten(1)
        if self.norm == "Linf":
            return delta.abs().amax(1)
        if self.norm == "L2":
            return delta.square().sum(1).sqrt()
        if self.norm == "L1":
            return delta.abs().sum(1)
        return (delta != 0).sum(1).double()

    def inside(self, x: Tensor, x_adv: Tensor) -> Tensor:
        """Tell which rows keep to the ball, with the written tolerance; bool, shape (N,)."""
        d = self.distance(x, x_adv)
        if self.norm == "Linf":
            return d <= self.radius + LINF_SLACK
        if self.norm in ("L2", "L1"):
            return d <= self.radius * (1 + LP_SLACK)
        return d <= self.radius

    def project(self, x: Tensor, x_adv: Tensor) -> Tensor:
        """Bring ``x_adv`` into ball and box around ``x``. Idempotent up to rounding; the result is ``inside``.

        Linf gives the nearest point, L0 too if ``x_adv`` is in the box; L2 and L1 project onto the ball and then clip,
        which for an ``x`` in the box stays in the ball (clipping moves each coordinate towards x).
        """
        if self.norm == "Linf":
            r = self.radius
            return x_adv.clamp(x - r, x + r).clamp_(0, 1)
        if self.norm == "L1" or (self.norm == "L2" and self.radius < FINE_L2):
            return self._project_finely(x, x_adv)
        return (x + self.shrink(x_adv - x)).clamp(0, 1)

    def _project_finely(self, x: Tensor, x_adv: Tensor) -> Tensor:
        """Project in float64 and round each coordinate towards x, so that rounding never leaves the ball."""
        import torch

        delta = self.shrink(x_adv.double() - x.double())
        point = (x.double() + delta).to(x.dtype)
        beyond = (point.double() - x.double()).abs() > delta.abs()
        return torch.where(beyond, torch.nextafter(point, x), point).clamp(0, 1)

    def shrink(self, delta: Tensor) -> Tensor:
        """Project a perturbation onto the ball around 0, ignoring the box; same shape as ``delta``."""
        r = self.radius
        flat = delta.flatten(1)
        if self.norm == "Linf":
            return delta.clamp(-r, r)
        if self.norm == "L2":
            norm = flat.norm(dim=1, keepdim=True)  # bit-equal for one row and for many, which a sum of squares is not
            return (flat * (r / norm.clamp_min(1e-20)).clamp_max(1.0)).view_as(delta)
        if self.norm == "L1":
            return _l1_ball(flat, r).view_as(delta)
        keep = min(int(r), flat.shape[1])
        if keep == 0:
            return delta * 0
        top = flat.abs().topk(keep, dim=1).indices
        return flat.new_zeros(flat.shape).scatter(1, top, flat.gather(1, top)).view_as(delta)


def _l1_ball(flat: Tensor, radius: float) -> Tensor:
    """Project rows (N, D) onto the L1 ball: Duchi et al., ICML 2008, figure 1."""
    if radius == 0:
        return flat * 0
    mag = flat.abs()
    sorted_mag = mag.sort(dim=1, descending=True).values
    excess = sorted_mag.cumsum(1) - radius
    rank = excess.new_ones(excess.shape).cumsum(1)
    rho = (sorted_mag * rank > excess).sum(1, keepdim=True).clamp_min(1)
    theta = (excess.gather(1, rho - 1) / rho).clamp_min(0)
    projected = (mag - theta).clamp_min(0) * flat.sign()
    return projected.where(mag.sum(1, keepdim=True) > radius, flat)
