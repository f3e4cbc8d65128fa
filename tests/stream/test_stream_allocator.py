"""Returning freed memory: no memory where there was some."""

import subprocess
import sys

import pytest

from qlib.allocator import keep_freed_memory

RETURNED = """
import torch
from qlib.allocator import keep_freed_memory
from qlib.evaluate.memory import anonymous_bytes
from qlib.stream.allocator import return_freed_memory
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
