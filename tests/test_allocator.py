"""Keeping freed memory: no page faults where there were some; returning it: no memory where there was some."""

import subprocess
import sys

import pytest

from qlib.allocator import keep_freed_memory

FAULTS = """
import resource, torch
from qlib.allocator import keep_freed_memory
if {keep}: keep_freed_memory()
for _ in range(20):
    torch.ones(4_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(4_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not keep_freed_memory(), reason="the C library has no mallopt")
def test_freed_memory_is_used_again_without_page_faults():
    count = {keep: int(subprocess.check_output([sys.executable, "-c", FAULTS.format(keep=keep)])) for keep in (False, True)}
    assert count[True] < 100 and count[True] <= count[False]


RETURNED = """
import torch
from qlib.allocator import keep_freed_memory, return_freed_memory
from qlib.evaluate.memory import anonymous_bytes
keep_freed_memory()
return_freed_memory()
before = anonymous_bytes()
kept = [torch.ones(2**20) for _ in range(20)]  # 4 MiB each
there = anonymous_bytes()
del kept[::2]
print(there - before, anonymous_bytes() - before)
"""


@pytest.mark.skipif(not keep_freed_memory(), reason="the C library has no mallopt")
def test_freed_memory_goes_back_even_between_what_is_in_use():
    there, left = map(int, subprocess.check_output([sys.executable, "-c", RETURNED]).split())
    assert there > 75e6 and left < 1.1 * there / 2
