"""Any grid: codes at their true size. No kernel multiplies with them, so they are dequantized for every call."""

import torch
import torch.nn.functional as F
from torch import nn

from qlib.layers.base import PackedLinear, channels_at_once, hold_bits
from qlib.layers.storage import from_tensors, stored_bytes, to_tensors, unpack_bits
from qlib.quantize.grid import CompressedWeight, Grid

__all__ = ["CodesLinear"]


class CodesLinear(PackedLinear):
    """Saves memory, not time: 2, 3, 5 and 6 bits, grouped int8, and shapes that the int4 kernels refuse."""

    def __init__(self, compressed: CompressedWeight, bias: nn.Parameter | None = None) -> None:
        super().__init__(compressed.grid, tuple(compressed.codes.shape), bias)
        tensors = to_tensors(compressed)
        self.register_buffer("codes", tensors["codes"])  # [out, in * bits / 8]
        self.register_buffer("scale_bits", hold_bits(tensors["scales"]))  # bf16 [out, groups]
        self.register_buffer("zeros", tensors.get("zeros"))  # one stream of [out * groups] codes

    def compressed(self) -> CompressedWeight:
        tensors = {"codes": self.codes, "scales": self.scale_bits.view(torch.bfloat16)}
        if self.zeros is not None:
            tensors["zeros"] = self.zeros
        return from_tensors(self.grid, tensors, (self.out_features, self.in_features))

    def expand_multiply(self, x: torch.Tensor) -> torch.Tensor:
        scales = self.scale_bits.view(torch.bfloat16)[..., None]  # [out, groups, 1]
        if self.zeros is None:
            zeros = torch.full_like(scales, self.grid.levels // 2)
        else:
            zeros = unpack_bits(self.zeros[None], self.grid.bits, scales.numel()).view(scales.shape).bfloat16()
        out = x.new_empty(len(x), self.out_features)
        step = channels_at_once(self.in_features)
        for start in range(0, self.out_features, step):
            part = slice(start, start + step)
            weight = unpack_bits(self.codes[part], self.grid.bits, self.in_features).bfloat16()
            grouped = weight.view(len(weight), scales.shape[1], -1)
            grouped.sub_(zeros[part]).mul_(scales[part])  # the difference of codes is exact, so this rounds once
            out[:, part] = F.linear(x, weight, None if self.bias is None else self.bias[part])
        return out

    def kernel(self, rows: int) -> str:
        return f"no packed kernel for {self.grid.name}: dequantize to bf16, then matmul"

    @staticmethod
    def expected_bytes(grid: Grid, out_features: int, in_features: int) -> int:
        """Bytes resident for a weight of this shape, without bias."""
        return stored_bytes(grid, out_features, in_features)
