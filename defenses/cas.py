"""CAS, channel-wise activation suppressing, and FGAA's ablations SAA and CSAA, in FGAA's places.

CAS (Bai et al., ICLR 2021): a linear layer with bias scores the means over positions; its weight row weighs channels.
SAA and CSAA are named by FGAA's Table 6 and defined nowhere; they are reconstructions (papers.md 7): SAA scores the
mean over channels, its row weighs positions; CSAA puts a CAS mask and then an SAA mask in each place, two heads each.
"""

from __future__ import annotations

from torch import nn

from arena.backbones import DatasetInfo
from arena.specs import Value

from .masks import ClassMask, fit_masks, surface
from .placement import late

__all__ = ["build_cas", "build_csaa", "build_saa", "surface"]


def build_cas(backbone: nn.Module, dataset: DatasetInfo, slots: Value = "auto", **options: Value) -> nn.Module:
    """Place a mask over channels in each of ``slots`` (``placement.late``).

    Raises:
        ArenaError: no such slot, or the backbone has fewer than two.
    """
    return _build("cas", ("channels",), backbone, dataset, slots)


def build_saa(backbone: nn.Module, dataset: DatasetInfo, slots: Value = "auto", **options: Value) -> nn.Module:
    """Place a mask over positions in each of ``slots``; raises as ``build_cas``. Reconstruction."""
    return _build("saa", ("positions",), backbone, dataset, slots)


def build_csaa(backbone: nn.Module, dataset: DatasetInfo, slots: Value = "auto", **options: Value) -> nn.Module:
    """Place a mask over channels and then one over positions in each of ``slots``; raises as ``build_cas``.
    Reconstruction."""
    return _build("csaa", ("channels", "positions"), backbone, dataset, slots)


def _build(owner: str, kinds: tuple[str, ...], backbone: nn.Module, dataset: DatasetInfo, slots: Value) -> nn.Module:
    def make(shape: tuple[int, int, int]) -> nn.Module:
        masks = [ClassMask(shape, dataset.n_classes, bias=True, over=kind) for kind in kinds]
        return masks[0] if len(masks) == 1 else nn.Sequential(*masks)

    return fit_masks(backbone, dataset, late(backbone, dataset, owner, slots), make)
