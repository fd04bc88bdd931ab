"""FD, feature denoising (Xie et al., CVPR 2019): non-local blocks with a residual connection.

y = a + BN(conv1x1(nonlocal(a))), the scale of the batch norm initialised to 0: a fresh block is the identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arena.backbones import DatasetInfo, place, slot_shapes
from arena.specs import Value, text
from arena.stages import Context, Usual
from arena.training import Stage

from .placement import ends, first


class NonLocal(nn.Module):
    """Weighted means over all positions of a map (N, C, H, W); weights from the embeddings theta, phi: C -> C / 2.

    ``gaussian``: softmax over positions of theta' phi / sqrt(C / 2). ``dot``: theta' phi / (H W), which is linear in
    phi, so the product over positions is taken first. The values are a itself.
    """

    def __init__(self, channels: int, kind: str) -> None:
        super().__init__()
        inner = max(1, channels // 2)
        self.kind = kind
        self.theta = nn.Conv2d(channels, inner, 1, bias=False)
        self.phi = nn.Conv2d(channels, inner, 1, bias=False)
        for embedding in (self.theta, self.phi):
            nn.init.normal_(embedding.weight, std=0.01)

    def forward(self, a: Tensor) -> Tensor:
        theta, phi, values = (t.flatten(2) for t in (self.theta(a), self.phi(a), a))  # (N, C', P)
        if self.kind == "dot":
            found = torch.bmm(torch.bmm(values, phi.transpose(1, 2)), theta) / values.shape[2]
        else:
            weights = torch.bmm(theta.transpose(1, 2), phi) / theta.shape[1] ** 0.5  # (N, P, P): row i asks, j answers
            found = torch.bmm(values, weights.softmax(2).transpose(1, 2))
        return found.view_as(a)


class Denoise(nn.Module):
    """a + BN(conv1x1(nonlocal(a)))."""

    def __init__(self, channels: int, kind: str = "gaussian") -> None:
        super().__init__()
        self.nonlocal_ = NonLocal(channels, kind)
        self.conv = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.norm.weight)

    def forward(self, a: Tensor) -> Tensor:
        found: Tensor = a + self.norm(self.conv(self.nonlocal_(a)))
        return found


def build(
    backbone: nn.Module, dataset: DatasetInfo, kind: Value = "gaussian", at: Value = "stages", **options: Value
) -> nn.Module:
    """Place a block at each stage's end, or (``at=first``) in the first two slots.

    Raises:
        ArenaError: the backbone has no slots.
    """
    if text(at) == "stages":
        chosen = ends(backbone, dataset, "denoising")
    else:
        chosen = first(backbone, dataset, "denoising", 2)
    shapes = slot_shapes(backbone, dataset.shape, tuple(chosen))
    return place(backbone, {slot: Denoise(shapes[slot][0], text(kind)) for slot in chosen})


@dataclass(frozen=True)
class Squared(Usual):
    """Regular training on the squared distance of the outputs to one-hot targets, as DeepDefense trains."""

    recipe: str = "rt"

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean squared error over rows and classes."""
        out = model(x)
        value = F.mse_loss(out, F.one_hot(y, out.shape[1]).to(out.dtype))
        return value, {"main": value.detach()}


def rt(loss: Value = "mse", **options: Value) -> Sequence[Stage]:
    """Regular training, on ``mse`` or ``ce``."""
    return [Squared() if text(loss) == "mse" else Usual("rt")]
