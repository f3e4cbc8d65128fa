"""A function in a fresh process: its peak memory is its own, and what it frees goes back to the system."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

import torch

from qlib.progress import silence

__all__ = ["in_child"]


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function` (of a module that can be imported) returns there, on as many threads as here.

    Raises:
        RuntimeError: the process was killed, for want of memory as a rule; and whatever the function raises.
    """
    begin = {"initializer": _begin, "initargs": (torch.get_num_threads(),)}
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), **begin) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise RuntimeError(f"{function.__name__}{arguments}: its process was killed; is there enough memory?") from None


def _begin(threads: int) -> None:
    torch.set_num_threads(threads)
    silence()
