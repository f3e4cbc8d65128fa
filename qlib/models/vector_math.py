"""Call the functions of the vector library behind torch once, before several threads call one for the first time.

Where the first cosine of a process was asked for by two threads at once (it is that of the rotary tables), one of them
now and then took it in other last bits than ever after, on a busy machine. What a library looks up in its first call is
looked up by one thread here.
"""

from functools import lru_cache

import torch

__all__ = ["FUNCTIONS", "call_once"]

#: What torch hands to the vector library for contiguous fp32 numbers, of what models compute with.
FUNCTIONS = ("cos", "sin", "exp", "log", "tanh", "erf")


@lru_cache(maxsize=None)
def call_once() -> None:
    """Call each of `FUNCTIONS` on a single number, which no other thread helps with; later calls do nothing."""
    number = torch.full((1,), 0.5, device="cpu")
    for name in FUNCTIONS:
        getattr(number, name)()
