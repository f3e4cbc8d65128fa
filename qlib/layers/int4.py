"""4 bits in groups, on torch's packed int4 kernels for CPU and CUDA."""

import torch
from torch import nn

from qlib.errors import UserError
from qlib.layers import int4_blocks
from qlib.layers.base import PackedLinear, hold_bits
from qlib.quantize.grid import CompressedWeight, Grid

__all__ = ["Int4Linear", "GROUPS"]

#: Group sizes both kernels know.
GROUPS = (32, 64, 128)

MIDDLE = 8


class Int4Linear(PackedLinear):
    """int4 with groups of 32, 64 or 128.

    The kernels compute a weight as (code - 8) * scale + zero, scale and zero in bf16, so a zero code becomes
    (8 - zero code) * scale. Rounding that to bf16 moves a weight by at most 1/64 of a step, and the zero code can be
    read back from it. The two kernels want the codes in different orders; they are re-packed when the layer moves
    between CPU and CUDA.
    """

    #: Measured on a CPU: from about 65 rows on, dequantizing to bf16 and multiplying is faster than the int4 kernel.
    packed_rows = 64

    def __init__(self, compressed: CompressedWeight, bias: nn.Parameter | None = None) -> None:
        super().__init__(compressed.grid, tuple(compressed.codes.shape), bias)
        self._fill(compressed)

    @staticmethod
    def fits(grid: Grid, out_features: int, in_features: int) -> bool:
        """Whether the kernels take a weight of this grid and shape."""
        return grid.bits == 4 and grid.group_size in GROUPS and out_features % 16 == 0

    def _fill(self, compressed: CompressedWeight) -> None:
        scales = compressed.scales.t().contiguous()  # [groups, out]
        zeros = ((MIDDLE - compressed.zeros.t().float()) * scales.float()).bfloat16()
        if not torch.equal(self._zero_codes(scales, zeros), compressed.zeros.t()):
            raise UserError("int4: a scale is so small or so large that bf16 cannot hold the zero beside it")
        self.register_buffer("packed", _pack(compressed.codes))
        self.register_buffer("scale_bits", hold_bits(torch.stack([scales, zeros], dim=-1)))  # bf16 [groups, out, 2]

    def compressed(self) -> CompressedWeight:
        scales, zeros = self._scales_and_zeros().unbind(-1)
        zero_codes = self._zero_codes(scales, zeros).t().contiguous()
        return CompressedWeight(self.grid, self._codes(), scales.t().contiguous(), zero_codes)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        out = _kernel_of(x)(x.contiguous(), self.packed, self.grid.group_size, self._scales_and_zeros())
        return out if self.bias is None else out.add_(self.bias)

    def expand_multiply(self, x: torch.Tensor) -> torch.Tensor:
        scales, zeros = self._scales_and_zeros().unbind(-1)
        zero_codes = self._zero_codes(scales, zeros)
        return int4_blocks.expand_multiply(x, self.packed, scales, zero_codes, self.bias)

    def runs_packed(self, rows: int) -> bool:
        return super().runs_packed(rows) or self.packed.device.type != "cpu" or int4_blocks.block_rows() is None

    def kernel(self, rows: int) -> str:
        if not self.runs_packed(rows):
            return "int4 blocks dequantized to bf16, then matmul"
        name = "_weight_int4pack_mm_for_cpu" if self.packed.device.type == "cpu" else "_weight_int4pack_mm"
        many = ", whose layout is not readable here, for any number of rows" if rows > self.packed_rows else ""
        return f"packed int4 (torch {name}{many})"

    def _scales_and_zeros(self) -> torch.Tensor:
        return self.scale_bits.view(torch.bfloat16)

    @staticmethod
    def _zero_codes(scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        steps = (zeros / scales).round_()  # within 1/30 of a whole number, even in bf16
        return steps.neg_().add_(MIDDLE).to(torch.uint8)

    def _codes(self) -> torch.Tensor:
        """uint8 `[out, in]`. Where the layout is unknown, ask the kernel: identity times codes, scale 1, zero 0."""
        if self.packed.device.type == "cpu" and int4_blocks.block_rows() is not None:
            return int4_blocks.unpack(self.packed)
        neutral = torch.zeros_like(self._scales_and_zeros())
        neutral[..., 0] = 1
        columns = []
        for start in range(0, self.in_features, 256):
            width = min(256, self.in_features - start)
            unit = neutral.new_zeros(width, self.in_features)
            unit[torch.arange(width), start + torch.arange(width)] = 1
            codes = _kernel_of(unit)(unit, self.packed, self.grid.group_size, neutral)  # [width, out]
            columns.append((codes + MIDDLE).to(torch.uint8).t())
        return torch.cat(columns, dim=1)

    def _apply(self, fn, recurse: bool = True):
        """Called by ``.to``, ``.cuda`` and the like: re-pack the codes if the kind of device changes."""
        target = fn(torch.empty(0, dtype=torch.uint8, device=self.packed.device)).device
        compressed = self.compressed() if target.type != self.packed.device.type else None
        super()._apply(fn, recurse)
        if compressed is not None and target.type != "meta":
            moved = (tensor.to(target) for tensor in (compressed.codes, compressed.scales, compressed.zeros))
            self._fill(CompressedWeight(self.grid, *moved))
        return self

    @staticmethod
    def expected_bytes(grid: Grid, out_features: int, in_features: int) -> int:
        """Bytes resident for a weight of this shape, without bias."""
        return out_features * (in_features // 2 + 4 * grid.groups(in_features))


def _kernel_of(x: torch.Tensor):
    ops = torch.ops.aten
    return ops._weight_int4pack_mm_for_cpu if x.device.type == "cpu" else ops._weight_int4pack_mm


def _pack(codes: torch.Tensor) -> torch.Tensor:
    """Order codes `[out, in]` as the kernel of their device reads them."""
    if codes.device.type == "cpu":
        return int4_blocks.pack(codes)
    pairs = codes[:, ::2] << 4 | codes[:, 1::2]  # [out, in / 2]
    tiles = next(tiles for tiles in (8, 4, 2) if codes.shape[1] % (16 * tiles) == 0)
    return torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), tiles)
