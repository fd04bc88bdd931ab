"""A pass's memory is faulted in once, and a user's own settings of the C library stand."""

import os
import subprocess
import sys

import pytest

from arena.heap import keep_freed_memory

#: Prints how many pages are faulted in by 32 rounds of 4 MB, after the first.
ROUNDS = """
import resource, torch
from torch import nn
from arena.surface import Surface
from arena.target import Target
Target(nn.Flatten(), Surface(), 4)
torch.ones(1 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(32):
    torch.ones(1 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
A_ROUND = (4 << 20) // os.sysconf("SC_PAGE_SIZE")


def faults(**variables):
    env = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | variables
    return int(subprocess.run([sys.executable, "-c", ROUNDS], env=env, capture_output=True, check=True).stdout)


@pytest.mark.skipif(not keep_freed_memory(), reason="no glibc, or MALLOC_... is set")
def test_a_pass_finds_the_memory_that_the_one_before_freed():
    assert faults() < 4 * A_ROUND
    assert faults(MALLOC_MMAP_THRESHOLD_="65536") > 16 * A_ROUND
