"""Memory that passes free is kept for the next pass, not handed back to the system."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache

#: glibc's names for: free memory at the top of the heap that is kept; size from which memory is no heap's.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
#: Bytes. A single tensor of at least ``LARGE`` still goes back to the system when it is freed.
KEPT, LARGE = 2**31 - 1, 2**30


@cache
def keep_freed_memory() -> bool:
    """Make the C library keep what the process frees, and return whether it does.

    Every pass allocates and frees the same megabytes. Handed back each time, they come back as empty pages that the
    system fills with zeros, one fault a page: on a CPU an eighth of a pass of a ResNet-18 of width 16. The process then
    stays as large as it once was, and grows no larger for it. Only glibc is told, and not where the user told it
    something else (``MALLOC_...`` in the environment).
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_MMAP_THRESHOLD, LARGE)) and bool(mallopt(_TRIM_THRESHOLD, KEPT))
