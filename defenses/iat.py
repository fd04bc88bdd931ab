"""IAT, interpolated adversarial training (Lamb et al., AISec 2019): mixup on natural and on adversarial images.

L = 1/2 mixup-CE(natural) + 1/2 mixup-CE(adversarial), where the inner attack starts from the unmixed images and each
half draws its own partners and its own weight (papers.md 7).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arena.specs import Value
from arena.stages import Context, Usual
from arena.training import Stage


@dataclass(frozen=True)
class Mix:
    """One draw of mixup (Zhang et al., ICLR 2018): weight ``share`` on the row itself, the rest on its partner."""

    share: float
    """In [0, 1], one number for the batch."""
    partner: Tensor
    """(N,) int64, a permutation of the rows."""

    def images(self, x: Tensor) -> Tensor:
        """Mix images (N, C, H, W)."""
        return self.share * x + (1 - self.share) * x[self.partner]

    def cross_entropy(self, logits: Tensor, y: Tensor) -> Tensor:
        """Return the cross-entropy of logits (N, K) with the mixed labels, mean over rows."""
        own, other = F.cross_entropy(logits, y), F.cross_entropy(logits, y[self.partner])
        return self.share * own + (1 - self.share) * other


def draw(n: int, alpha: float, generator: torch.Generator) -> Mix:
    """Draw share ~ Beta(alpha, alpha) and partners for ``n`` rows."""
    if alpha == 1:  # the uniform distribution
        share = torch.rand((), generator=generator, device=generator.device)
    else:
        share = torch.distributions.Beta(alpha, alpha).sample()  # from the global generator, seeded every epoch
    return Mix(float(share), torch.randperm(n, generator=generator, device=generator.device))


@dataclass(frozen=True)
class Interpolated(Usual):
    """Adversarial training on mixed images; the inner attack is that of ``sat``."""

    recipe: str = "sat"
    alpha: float = 1.0
    """Both parameters of the Beta distribution."""

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean of the two mixed cross-entropies, each on a pass and a draw of its own."""
        assert ctx.x_adv is not None
        halves = [self._half(model, images, y, ctx.generator) for images in (x, ctx.x_adv)]
        log = {"natural": halves[0].detach(), "adversarial": halves[1].detach()}
        return (halves[0] + halves[1]) / 2, log

    def _half(self, model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        mix = draw(len(x), self.alpha, generator)
        return mix.cross_entropy(model(mix.images(x)), y)


def recipe(alpha: Value = 1.0, **options: Value) -> Sequence[Stage]:
    """Interpolated adversarial training."""
    return [Interpolated(alpha=float(alpha))]
