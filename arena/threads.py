"""How many CPU threads a piece of work gets."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

#: Models and images up to which the CPU works on one thread: parameters, numbers an image. Training's sums then come
#: out the same on any number of cores, so equal keys mean equal weights.
SMALL_MODEL, SMALL_IMAGE = 1_000_000, 256


def small(device: str, parameters: int, shape: Sequence[int]) -> bool:
    """Tell whether one thread is enough for a model with so many ``parameters`` on images (C, H, W)."""
    return device == "cpu" and parameters <= SMALL_MODEL and math.prod(shape) <= SMALL_IMAGE


@contextmanager
def one_thread(wanted: bool) -> Iterator[int]:
    """Run the block on one CPU thread if ``wanted``, and yield the number of threads it has.

    On 8x8 pictures a second thread gains a tenth at best; on a busy machine it costs a multiple in waiting.
    """
    before = torch.get_num_threads()
    if wanted:
        torch.set_num_threads(1)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
