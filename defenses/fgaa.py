"""FGAA, fine-grained activation alignment: class-conditional masks in the backbone's last two slots.

ResNet-18: at the end, after the ReLU, of each of the two layer4 blocks, so the second head sees features that the first
has masked. Masks have no bias. At test time each module follows its own head's argmax, as the official code does; the
paper's Algorithm 1 says the argmax of the main logits, which lie downstream of the mask, and is not offered.
"""

from __future__ import annotations

from torch import nn

from arena.backbones import DatasetInfo, place, slot_shapes
from arena.errors import ArenaError
from arena.specs import Value

from .masks import fitting, surface

__all__ = ["build", "surface"]


def build(backbone: nn.Module, dataset: DatasetInfo, **options: Value) -> nn.Module:
    """Place a mask in each of the last two slots.

    Raises:
        ArenaError: the backbone has fewer than two slots.
    """
    reached = list(slot_shapes(backbone, dataset.shape, dataset.slots))
    if len(reached) < 2:
        raise ArenaError(f"fgaa: backbone '{dataset.backbone}' has {len(reached)} slots, expected at least 2")
    return place(backbone, fitting(backbone, dataset, reached[-2:], bias=False))
