"""Augmentation of whole batches on the device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = ("none", "shift", "crop_flip")


def augment(x: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """Shift each image by up to an eighth of its side, zeros moving in; ``crop_flip`` also mirrors half of them.

    (N, C, H, W) in and out; the result's channels are last in memory.
    """
    if kind == "none":
        return x
    if kind not in KINDS:
        raise ValueError(f"augment '{kind}': expected {', '.join(KINDS)}")
    n, _, h, w = x.shape
    up, left = max(1, round(h / 8)), max(1, round(w / 8))

    def offsets(side: int, reach: int) -> Tensor:
        first = torch.randint(0, 2 * reach + 1, (n, 1), generator=generator, device=x.device)
        return first + torch.arange(side, device=x.device)

    rows, columns = offsets(h, up), offsets(w, left)
    if kind == "crop_flip":
        flip = torch.rand(n, 1, generator=generator, device=x.device) < 0.5
        columns = torch.where(flip, columns.flip(1), columns)
    padded = F.pad(x, (left, left, up, up)).permute(0, 2, 3, 1)
    each = torch.arange(n, device=x.device).view(n, 1, 1)
    return padded[each, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
