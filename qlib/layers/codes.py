"""Any grid: codes at their true size. No kernel multiplies with them, so they are dequantized for every call."""

import torch
import torch.nn.functional as F
from torch import nn

from qlib.layers.base import PackedLinear, channels_at_once, hold_bits
from qlib.layers.storage import expected_tensors, from_tensors, stored_bytes, to_tensors
from qlib.quantize.grid import CompressedWeight, Grid, scale_values, values_of

__all__ = ["CodesLinear"]


class CodesLinear(PackedLinear):
    """Saves memory, not time: 2, 3, 5 and 6 bits, grouped int8, and shapes that the int4 kernels refuse."""

    def __init__(self, compressed: CompressedWeight, bias: nn.Parameter | None = None) -> None:
        super().__init__(compressed.grid, tuple(compressed.codes.shape), bias)
        for name, tensor in to_tensors(compressed).items():
            self.register_buffer(name, hold_bits(tensor))

    def compressed(self) -> CompressedWeight:
        shape = (self.out_features, self.in_features)
        types = {name: dtype for name, (dtype, _) in expected_tensors(self.grid, shape).items()}
        return from_tensors(self.grid, {name: getattr(self, name).view(types[name]) for name in types}, shape)

    def expand_multiply(self, x: torch.Tensor) -> torch.Tensor:
        compressed = self.compressed()
        scales, zeros = scale_values(compressed.scales, compressed.tensor_scale), compressed.zeros.float()
        out = x.new_empty(len(x), self.out_features)
        step = channels_at_once(self.in_features, x.device)
        for start in range(0, self.out_features, step):
            part = slice(start, start + step)
            codes = compressed.codes[part].view(-1, scales.shape[1], self.in_features // scales.shape[1])
            weight = values_of(codes, self.grid, scales[part, :, None], zeros[part, :, None]).bfloat16().flatten(1)
            out[:, part] = F.linear(x, weight, None if self.bias is None else self.bias[part])
        return out

    def kernel(self, rows: int) -> str:
        return f"no packed kernel for {self.grid.name}: dequantize to bf16, then matmul"

    @staticmethod
    def expected_bytes(grid: Grid, out_features: int, in_features: int) -> int:
        """Bytes resident for a weight of this shape, without bias."""
        return stored_bytes(grid, out_features, in_features)
