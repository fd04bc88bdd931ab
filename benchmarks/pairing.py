"""Two sides compared on the same points: what only one of them breaks, and McNemar's exact test of it."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import numpy as np

from arena.statistics import mcnemar

#: Names the images, and says which of them the one side and the other breaks: two masks (n,) in the images' order.
Pair = tuple[Hashable, np.ndarray, np.ndarray]


def discordant(pairs: Iterable[Pair]) -> tuple[int, int, float]:
    """Count points that only the first side breaks, and only the second, over all pairs; p is McNemar's, exact.

    Pairs of the same name share their images, the k-th of one being the k-th of another. In the test an image counts
    once: for the side that alone breaks it in more of the pairs, for none where both do equally often.
    """
    only_first = only_second = 0
    lead: dict[Hashable, np.ndarray] = {}
    for images, first, second in pairs:
        only_first += int((first & ~second).sum())
        only_second += int((second & ~first).sum())
        found, before = first.astype(int) - second, lead.get(images, np.zeros(0, int))
        total = np.zeros(max(len(found), len(before)), int)
        total[: len(found)] += found
        total[: len(before)] += before
        lead[images] = total
    ahead = sum(int((v > 0).sum()) for v in lead.values())
    behind = sum(int((v < 0).sum()) for v in lead.values())
    return only_first, only_second, mcnemar(ahead, behind)
