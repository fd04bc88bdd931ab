"""FGAA, fine-grained activation alignment: class-conditional masks, element by element, in the last layers.

ResNet-18: at the end, after the ReLU, of each of the two layer4 blocks, so the second head sees features that the first
has masked; VGG16 and wide residual networks: ``placement.late``. Masks have no bias. At test time each module follows
its own head's argmax, as the official code does; the paper's Algorithm 1 says the argmax of the main logits, which lie
downstream of the mask: ``masks.follow``.
"""

from __future__ import annotations

from torch import nn

from arena.backbones import DatasetInfo
from arena.specs import Value

from .masks import ClassMask, fit_masks, surface
from .placement import late

__all__ = ["build", "surface"]


def build(backbone: nn.Module, dataset: DatasetInfo, slots: Value = "auto", **options: Value) -> nn.Module:
    """Place a mask in each of ``slots`` (``placement.late``).

    Raises:
        ArenaError: no such slot, or the backbone has fewer than two.
    """
    where = late(backbone, dataset, "fgaa", slots)
    return fit_masks(backbone, dataset, where, lambda shape: ClassMask(shape, dataset.n_classes, bias=False))
