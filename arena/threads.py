"""How many CPU threads a piece of work gets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
