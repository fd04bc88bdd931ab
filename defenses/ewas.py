"""EWAS, element-wise activation scaling: one class-conditional mask, with bias, before the last block.

ResNet-18: between layer4[0] and layer4[1], the paper's layer 15; other places and backbones: ``placement.single``. At
test time the class is the auxiliary classifier's own argmax; here the switch is ``supervise``, where the official code
looks whether a label was passed.
"""

from __future__ import annotations

from torch import nn

from arena.backbones import DatasetInfo
from arena.specs import Value

from .masks import ClassMask, fit_masks, surface
from .placement import single

__all__ = ["build", "surface"]


def build(backbone: nn.Module, dataset: DatasetInfo, slot: Value = "auto", **options: Value) -> nn.Module:
    """Place one mask in ``slot`` (``placement.single``).

    Raises:
        ArenaError: no such slot or layer, or the backbone has fewer than two slots.
    """
    where = single(backbone, dataset, "ewas", slot)
    return fit_masks(backbone, dataset, [where], lambda shape: ClassMask(shape, dataset.n_classes, bias=True))
