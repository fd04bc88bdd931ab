"""The nearest point of a hyperplane inside the box, for Linf and L2.

Croce & Hein 2020 (arXiv 1907.02044), section 3.1.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ascending(values: Tensor) -> tuple[Tensor, Tensor]:
    """Sort each row of (N, D) float32, not negative, and return (sorted, positions); equal values stay in their order.

    On a CPU as whole numbers, the value's bits above its position: numpy sorts those with vector instructions, many
    times faster than torch sorts pairs.
    """
    if values.device.type != "cpu":
        return values.sort(dim=1, stable=True)
    keys = (values.view(torch.int32).to(torch.int64) << 32).bitwise_or_(torch.arange(values.shape[1]))
    keys.numpy().sort(axis=1)
    order = keys.bitwise_and_(0xFFFFFFFF)
    return values.gather(1, order), order


def displacement(norm: str, x: Tensor, normal: Tensor, offset: Tensor) -> Tensor:
    """Return the smallest d with <normal, x + d> = <normal, x> + offset and x + d in [0, 1].

    Moving along d, every pixel goes towards the hyperplane as far as the radius t (Linf: t itself, L2: t |w_i|) or the
    box lets it. What is gained, sum |w_i| min(reach_i(t), room_i), is increasing, concave and piecewise linear in t, so
    sorting the values of t at which pixels meet the box gives t exactly.

    Args:
        norm: ``Linf`` or ``L2``.
        x: points in the box, (N, D).
        normal: w, (N, D); finite.
        offset: c, (N,); either sign.

    Returns:
        (N, D). Where no point of the box reaches the hyperplane, the way to the box's corner nearest to it.
    """
    # selections by arithmetic where that is exact: a branch a pixel costs more than all else here but the sort
    way = normal * (1 - 2 * (offset < 0).to(normal.dtype)).unsqueeze(1)
    need = offset.abs().unsqueeze(1)
    steep = way.abs()
    room = ((way > 0).to(x.dtype) - x).abs()
    if norm == "Linf":
        slope, meets = steep, room
    else:
        slope, meets = steep.square(), torch.where(steep > 0, room / steep.clamp_min(1e-30), torch.inf)
    meets, order = ascending(meets)
    # gain at the k-th meeting point: pixels that met the box gave all they have, the others their slope times t
    full = (steep * room).gather(1, order).cumsum(1)
    ordered = slope.gather(1, order)
    free = (ordered.flip(1).cumsum(1).flip(1) - ordered).clamp_min(0)
    gain = full + free * meets.clamp_max(torch.finfo(meets.dtype).max)  # where they meet at infinity none is free
    # the first meeting point that gains enough; before it, the gain is a line
    k = (gain < need).sum(1, keepdim=True)
    reachable = k < x.shape[1]
    k = k.clamp_max(x.shape[1] - 1)
    given = torch.where(k > 0, full.gather(1, (k - 1).clamp_min(0)), 0.0)
    rate = free.gather(1, k) + ordered.gather(1, k)
    t = ((need - given).clamp_min(0) / rate.clamp_min(1e-30)).minimum(meets.gather(1, k))
    reach = t if norm == "Linf" else t * steep
    return torch.where(reachable, room.minimum(reach), room) * way.sign()
