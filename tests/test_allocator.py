"""Keeping freed memory: no page faults where there were some."""

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
