"""2 bits in groups, on our own CPU kernel: half the bytes of int4 to keep, and to fetch for every token.

Output channels come in blocks of 64. A block is `[in, 16]` bytes: byte j of an input channel holds output channels j, j + 16,
j + 32 and j + 48, the first in its lowest bits. So the halves of a block of int4 (int4_blocks.py) are two masks away.
"""

import torch

from qlib.layers import int4_blocks, native
from qlib.layers.base import SCRATCH_BYTES
from qlib.layers.int4 import Int4Linear
from qlib.quantize.grid import Grid

__all__ = ["Int2Linear", "pack", "unpack"]

BLOCK = 64


class Int2Linear(Int4Linear):
    """2 bits. On a CPU codes take 2 bits in memory; where the layer moves to another device they become those of int4.

    The kernel computes a weight as (code - 2) * scale + zero, scale and zero as in int4.
    """

    #: Measured on a processor with AMX: for more rows dequantizing to bf16 and multiplying is faster.
    packed_rows = 14
    own_kernel = "int2_rows"

    @staticmethod
    def fits(grid: Grid, out_features: int, in_features: int) -> bool:
        """Whether the kernel takes a weight of this grid and shape, and runs on this machine."""
        small = grid.bits == 2 and Int4Linear.fits(grid, out_features, in_features)
        return small and out_features % BLOCK == 0 and runs_here()

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        if not self._is_narrow():
            return super().multiply(x)
        return native.int2_rows(x, self.packed, self._scales_and_zeros(), self.bias)

    def expand_multiply(self, x: torch.Tensor) -> torch.Tensor:
        if not self._is_narrow():
            return super().expand_multiply(x)
        out, both = x.new_empty(len(x), self.out_features), self._scales_and_zeros()
        if int4_blocks.multiplies_natively():
            native.int4_multiply(x, self.packed, both, out)
            return out if self.bias is None else out.add_(self.bias)
        step = max(1, SCRATCH_BYTES // (BLOCK * self.in_features // 2)) * BLOCK
        for start in range(0, self.out_features, step):
            part = slice(start, min(start + step, self.out_features))
            bias = None if self.bias is None else self.bias[part]
            wide = native.int2_widen(self.packed[part])
            out[:, part] = int4_blocks.expand_multiply(x, wide, both[:, part].contiguous(), bias)
        return out

    def runs_packed(self, rows: int) -> bool:
        return rows <= self.packed_rows if self._is_narrow() else super().runs_packed(rows)

    def kernel(self, rows: int) -> str:
        if not self._is_narrow():
            return super().kernel(rows)
        if self.runs_packed(rows):
            return "packed int2 (own kernel)"
        many = "in the matmul (AMX, own kernel)" if int4_blocks.multiplies_natively() else "(our own), then matmul"
        return f"int2 dequantized to bf16 {many}"

    def _is_narrow(self) -> bool:
        """Whether codes are held in the order of this module."""
        return self.packed.device.type == "cpu"

    def _pack(self, codes: torch.Tensor, group: int) -> torch.Tensor:
        return pack(codes) if codes.device.type == "cpu" else super()._pack(codes, group)

    def _unpack(self) -> torch.Tensor:
        return unpack(self.packed) if self._is_narrow() else super()._unpack()

    @staticmethod
    def expected_bytes(grid: Grid, out_features: int, in_features: int) -> int:
        """Bytes resident on a CPU for a weight of this shape, without bias."""
        return Int4Linear.expected_bytes(grid, out_features, in_features) - out_features * in_features // 4


def runs_here() -> bool:
    """Whether this machine has our kernels, and torch keeps int4 in blocks of as many channels."""
    return not native.missing() and int4_blocks.block_rows() == BLOCK


def pack(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes `[out, in]` below 4, out in multiples of 64, to uint8 `[out, in / 4]` in the kernel's order."""
    quarters = codes.view(-1, 4, BLOCK // 4, codes.shape[1])
    joined = quarters[:, 0].clone()
    for index in range(1, 4):
        joined |= quarters[:, index] << 2 * index
    return joined.transpose(1, 2).contiguous().view(len(codes), -1)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack`."""
    blocks = packed.view(-1, 4 * packed.shape[1], BLOCK // 4)  # [blocks, in, bytes]
    codes = torch.empty(len(packed), 4 * packed.shape[1], dtype=torch.uint8)
    quarters = codes.view(-1, 4, BLOCK // 4, codes.shape[1])
    for index in range(4):
        quarters[:, index] = (blocks >> 2 * index & 3).transpose(1, 2)
    return codes
