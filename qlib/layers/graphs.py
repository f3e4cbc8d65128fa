"""CUDA graphs: a call is recorded once and replayed, because launching small kernels from Python takes longer than they run."""

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["recorded"]

WARM_UPS = 2  # kernels are compiled and chosen, and libraries make their workspaces, before the recording


def recorded(call: Callable[[], Any]) -> Callable[[], Any]:
    """A call that repeats what `call` did on the GPU, with tensors in the same places.

    It returns what `call` returned, filled anew. Tensors that `call` reads and that are changed in place are read anew.
    """
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            call()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Any:
        graph.replay()
        return result

    return replay
