"""Physical batches: how many rows a pass has.

Rows are evaluated in batches of at least 16, padded to a multiple of 8, because smaller and odd batches take other code
paths in the linear algebra libraries and give other last bits (measured on CPUs, fp32: batches of 1, 2, 7 and 9 differ,
on an Intel Xeon with MKL also a batch of 8 in a linear layer of 256 inputs; multiples of 8 from 16 on do not, but for
one sigmoid a row: with AVX-512 that needs multiples of 32).
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Fewest rows of a physical batch, and what its size is a multiple of.
PAD, STEP = 16, 8
#: And of a model with gates: one sigmoid a row comes out with other last bits where it fills no vectors of the CPU.
GATED_STEP = 32


def padded(rows: int, step: int = STEP) -> int:
    """Return the physical size of a batch of ``rows``: the next multiple of ``step``, at least 16."""
    return max(PAD, -(-rows // step) * step)


def piece(rows: int, most: int, step: int = STEP) -> int:
    """Return how many of so many rows the next batch takes.

    Batches are of about the same size, because a row of a small one costs more; none but the last needs padding.
    """
    batches = -(-rows // most)
    even, needed = rows // batches // step * step, padded(rows - (batches - 1) * most, step)
    return min(max(even, needed), rows)


def pad(x: Tensor) -> Tensor:
    """Repeat the last row until the batch has a physical size."""
    missing = padded(x.shape[0]) - x.shape[0]
    return torch.cat((x, x[-1:].expand(missing, *x.shape[1:]))) if missing else x


def out_of_memory(error: BaseException) -> bool:
    """Tell whether a pass failed for want of memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # the CPU allocator's words
