"""The overlap ratio: do clean and attacked images activate the same channels and positions? FGAA's diagnostic.

For a vector g of magnitudes, I(g) = {j : g_j >= max(g) e^-2} is what counts as active, and

    OR(x, x') = |I(g) & I(g')| / (|I(g) | I(g')| + 1e-8)

is near 1 where both activate the same, 0 where nothing is shared (papers.md 1). Meant for maps behind a ReLU: a vector
whose largest entry is negative has nothing active.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from arena.errors import ArenaError
from arena.inner import evaluating
from arena.surface import submodule

#: Share of the largest magnitude from which on a channel or position counts as active.
ACTIVE = math.exp(-2)
#: The same for the frequency with which a channel is active over images; EWAS's activation plots use it, too.
FREQUENT = 0.01
#: Rows a pass.
CHUNK = 256


def channel_magnitude(a: Tensor) -> Tensor:
    """Return the mean over positions of maps (N, C, H, W): (N, C)."""
    return a.mean((2, 3))


def spatial_magnitude(a: Tensor) -> Tensor:
    """Return the mean over channels of maps (N, C, H, W), flattened: (N, H W)."""
    return a.mean(1).flatten(1)


def channel_frequency(a: Tensor, share: float = FREQUENT) -> Tensor:
    """Return the share in [0, 1] of the N maps (N, C, H, W) in which each channel is active: (C,).

    A channel is active in a map where its magnitude is at least ``share`` of that map's largest, and above 0.
    """
    g = channel_magnitude(a)
    return ((g >= share * g.amax(1, keepdim=True)) & (g > 0)).to(g.dtype).mean(0)


def active(g: Tensor, share: float = ACTIVE) -> Tensor:
    """Return which entries of g (..., D) are at least ``share`` of the largest in their row: bool (..., D)."""
    return g >= share * g.amax(-1, keepdim=True)


def overlap_ratio(g: Tensor, g_adv: Tensor, share: float = ACTIVE) -> Tensor:
    """Return the overlap ratio of each row of two magnitudes (..., D), in [0, 1]: (...)."""
    one, other = active(g, share), active(g_adv, share)
    return (one & other).sum(-1) / ((one | other).sum(-1) + 1e-8)


def overlaps(model: nn.Module, path: str, x: Tensor, x_adv: Tensor) -> dict[str, float]:
    """Return the overlap ratios of clean and attacked images (N, C, H, W) in the map that submodule ``path`` gives.

    ``channel_magnitude`` and ``spatial_magnitude`` are means over the pairs of images. ``channel_frequency`` is one
    ratio of the two sets: which channels are frequent over all of ``x``, and over all of ``x_adv``. FGAA reports the
    three at the penultimate layer, so ``path`` is usually the backbone's last slot (``layer4.1.out``). Eval mode, no
    gradients.

    Raises:
        ArenaError: no such module, or its output is no feature map.
    """
    if len(x) == 0 or x.shape != x_adv.shape:
        raise ArenaError(f"overlaps: expected two equal, non-empty batches, got {tuple(x.shape)}, {tuple(x_adv.shape)}")
    clean, attacked = (_maps(model, path, images) for images in (x, x_adv))
    return {
        "channel_magnitude": float(overlap_ratio(channel_magnitude(clean), channel_magnitude(attacked)).mean()),
        "spatial_magnitude": float(overlap_ratio(spatial_magnitude(clean), spatial_magnitude(attacked)).mean()),
        "channel_frequency": float(overlap_ratio(channel_frequency(clean), channel_frequency(attacked))),
    }


def _maps(model: nn.Module, path: str, x: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = submodule(model, path).register_forward_hook(lambda _module, _inputs, out: seen.append(out))
    try:
        with evaluating(model), torch.no_grad():
            for rows in x.split(CHUNK):
                before = len(seen)
                model(rows)
                if len(seen) == before:
                    raise ArenaError(f"overlaps: '{path}' is not reached in a forward pass")
                del seen[before + 1 :]  # a second pass inside the model: the first counts
    finally:
        handle.remove()
    if any(not isinstance(a, Tensor) or a.dim() != 4 for a in seen):
        raise ArenaError(f"overlaps: '{path}' gives no feature map (N, C, H, W)")
    return torch.cat(seen)
