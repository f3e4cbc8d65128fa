"""A packed layer that only waits to be written: codes as they were solved, in no kernel's order."""

import torch
from torch import nn

from qlib.layers.base import PackedLinear
from qlib.quantize.grid import CompressedWeight

__all__ = ["HeldLinear"]


class HeldLinear(PackedLinear):
    """For blocks that are stored and not run, so that ordering codes for a kernel and back costs nothing.

    On the exact path (fp32) it computes like every packed layer; it has no kernel for bf16.
    """

    def __init__(self, compressed: CompressedWeight, bias: nn.Parameter | None = None) -> None:
        super().__init__(compressed.grid, tuple(compressed.codes.shape), bias)
        self.held = compressed

    def compressed(self) -> CompressedWeight:
        return self.held

    def expand_multiply(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.held.dequantize().to(x.dtype), self.bias)

    def kernel(self, rows: int) -> str:
        return "none: the layer waits to be written"

    def _apply(self, fn, recurse: bool = True):
        """Moved to the meta device, as a block is that has been written, it lets go of its codes."""
        super()._apply(fn, recurse)
        if fn(torch.empty(0)).is_meta:
            self.held = None
        return self
