"""EWAS, element-wise activation scaling: one class-conditional mask, with bias, between the last two blocks.

ResNet-18: between layer4[0] and layer4[1], the paper's layer 15. At test time the class is the auxiliary classifier's
own argmax; here the switch is ``supervise``, where the official code looks whether a label was passed.
"""

from __future__ import annotations

from torch import nn

from arena.backbones import DatasetInfo, place, slot_shapes
from arena.errors import ArenaError, unknown
from arena.specs import Value, text

from .masks import fitting, surface

__all__ = ["build", "surface"]


def build(backbone: nn.Module, dataset: DatasetInfo, slot: Value = "auto", **options: Value) -> nn.Module:
    """Place one mask in ``slot``; ``auto`` is the last slot but one.

    Raises:
        ArenaError: no such slot, or the backbone has fewer than two.
    """
    reached = list(slot_shapes(backbone, dataset.shape, dataset.slots))
    where = text(slot)
    if where == "auto":
        if len(reached) < 2:
            raise ArenaError(f"ewas: backbone '{dataset.backbone}' has {len(reached)} slots, expected at least 2")
        where = reached[-2]
    if where not in reached:
        raise unknown(f"slot of backbone '{dataset.backbone}'", where, reached)
    return place(backbone, fitting(backbone, dataset, [where], bias=True))
