"""8 bits, one scale per output channel, on torch's weight-only int8 kernel."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

from qlib.layers.base import PackedLinear, channels_at_once, hold_bits
from qlib.quantize.grid import CompressedWeight, Grid

__all__ = ["Int8Linear"]

MIDDLE = 128  # the kernel reads signed codes
CHANNELS = 32  # it reads past the end of rows that are not whole vectors: wrong sums, or a crash


class Int8Linear(PackedLinear):
    """int8 per output channel.

    The kernel knows no zero. With c' = code - 128, an asymmetric weight is c' * scale + (128 - zero) * scale, so its
    product is the kernel's plus (sum of the activations) * offset, offset = (128 - zero) * scale kept in fp32. The
    kernel rounds its sum to bf16 before, so weights far from centred lose a little more than their own rounding.
    """

    #: Measured: from about 20 rows on, converting codes to bf16 and multiplying is faster than the int8 kernel.
    packed_rows = 20

    def __init__(self, compressed: CompressedWeight, bias: nn.Parameter | None = None) -> None:
        super().__init__(compressed.grid, tuple(compressed.codes.shape), bias)
        scales, zeros = compressed.scales[:, 0], compressed.zeros[:, 0]
        self.register_buffer("codes", (compressed.codes ^ MIDDLE).view(torch.int8))  # [out, in], code - 128
        self.register_buffer("scale_bits", hold_bits(scales))  # bf16 [out]
        offsets = None if self.grid.symmetric else hold_bits((MIDDLE - zeros.float()) * scales.float())
        self.register_buffer("offset_bits", offsets)  # fp32 [out], exact: 8 bits times 8 bits

    def compressed(self) -> CompressedWeight:
        scales = self.scale_bits.view(torch.bfloat16)
        zeros = torch.full(scales.shape, MIDDLE, dtype=torch.uint8, device=scales.device)
        if self.offset_bits is not None:
            zeros = (MIDDLE - self.offset_bits.view(torch.float32) / scales.float()).round().to(torch.uint8)
        codes = self.codes.view(torch.uint8) ^ MIDDLE
        return CompressedWeight(self.grid, codes, scales[:, None].clone(), zeros[:, None])

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.ops.aten._weight_int8pack_mm(x.contiguous(), self.codes, self.scale_bits.view(torch.bfloat16))
        if self.offset_bits is not None:
            sums = x.sum(-1, keepdim=True, dtype=torch.float32)
            out.addcmul_(sums, self.offset_bits.view(torch.float32))  # computed in fp32, rounded once
        return out if self.bias is None else out.add_(self.bias)

    def expand_multiply(self, x: torch.Tensor) -> torch.Tensor:
        scales = self.scale_bits.view(torch.bfloat16).float()
        offsets = None if self.offset_bits is None else self.offset_bits.view(torch.float32)
        sums = None if offsets is None else x.sum(-1, keepdim=True, dtype=torch.float32)  # [rows, 1]
        out = x.new_empty(len(x), self.out_features)
        step = channels_at_once(self.in_features)
        scratch = x.new_empty(min(step, self.out_features), self.in_features)
        for start in range(0, self.out_features, step):
            part = slice(start, min(start + step, self.out_features))
            weight = scratch[: part.stop - start].copy_(self.codes[part])  # whole numbers up to 128: exact in bf16
            product = F.linear(x, weight).float().mul_(scales[part])
            if offsets is not None:
                product.addcmul_(sums, offsets[part])
            out[:, part] = product if self.bias is None else product.add_(self.bias[part])
        return out

    def runs_packed(self, rows: int) -> bool:
        return super().runs_packed(rows) and self.in_features % CHANNELS == 0 and _has_kernel(self.codes.device.type)

    def kernel(self, rows: int) -> str:
        if self.runs_packed(rows):
            return "int8 weight-only (torch _weight_int8pack_mm)"
        return "int8 codes to bf16, then matmul"

    @staticmethod
    def expected_bytes(grid: Grid, out_features: int, in_features: int) -> int:
        """Bytes resident for a weight of this shape, without bias."""
        return out_features * (in_features + 2 + (0 if grid.symmetric else 4))


@lru_cache(maxsize=None)
def _has_kernel(device: str) -> bool:
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device)
    return bool(key) and torch._C._dispatch_has_kernel_for_dispatch_key("aten::_weight_int8pack_mm", key)
