"""Up to 4 bits in groups, on our kernels and torch's packed int4 kernels for CPU and CUDA."""

import torch
import torch.nn.functional as F
from torch import nn

from qlib.errors import UserError
from qlib.layers import gpu, int4_blocks, native, native_blocks
from qlib.layers.base import PackedLinear, channels_at_once, hold_bits
from qlib.quantize.grid import CompressedWeight, Grid

__all__ = ["Int4Linear", "GROUPS"]

#: Group sizes torch's kernels know, the largest first.
GROUPS = (128, 64, 32)

MIDDLE = 8


class Int4Linear(PackedLinear):
    """4 bits, and 3 bits, which are kept as codes of 4 bits; also 2 bits where `Int2Linear` has no kernel.

    The kernels compute a weight as (code - 8) * scale + zero, scale and zero in bf16. Codes are moved so that the
    middle one becomes 8, and a zero code becomes (middle - zero code) * scale. Rounding that to bf16 moves a weight by
    at most 1/64 of a step, and the zero code can be read back from it; real zeros cannot, and are kept beside it. The
    kernels know groups of 32, 64 and 128 input channels: larger groups repeat their scale. Torch's kernels for CPU and
    CUDA want the codes in different orders; they are re-packed when the layer moves.
    """

    #: Measured on CPUs: for more rows dequantizing to bf16 and multiplying is faster, with our own kernel, on tile
    #: registers, or without either.
    packed_rows, packed_rows_tiled, packed_rows_without = 24, 7, 64
    #: The same of our kernel on a GPU.
    packed_rows_gpu = 64
    own_kernel = "int4_row"

    def __init__(self, compressed: CompressedWeight, bias: nn.Parameter | None = None) -> None:
        super().__init__(compressed.grid, tuple(compressed.codes.shape), bias)
        self._fill(compressed)

    @staticmethod
    def fits(grid: Grid, out_features: int, in_features: int) -> bool:
        """Whether the kernels take a weight of this grid and shape."""
        small = grid.element == "int" and grid.bits <= 4 and not grid.activations
        return small and out_features % 16 == 0 and _kernel_group(grid, in_features) is not None

    def _fill(self, compressed: CompressedWeight) -> None:
        repeat = self.in_features // _kernel_group(self.grid, self.in_features) // compressed.scales.shape[1]
        scales = compressed.scales.t().contiguous()  # [groups, out]
        zeros = ((self.grid.levels // 2 - compressed.zeros.t().float()) * scales.float()).bfloat16()
        kept = None
        if self.grid.real_zero:
            kept = hold_bits(compressed.zeros)
        elif not torch.equal(self._zero_codes(scales, zeros), compressed.zeros.t()):
            raise UserError("int4: a scale is so small or so large that bf16 cannot hold the zero beside it")
        both = torch.stack([scales, zeros], dim=-1).repeat_interleave(repeat, dim=0)
        self.register_buffer("packed", self._pack(compressed.codes, self.in_features // len(both)))
        self.register_buffer("scale_bits", hold_bits(both))  # bf16 [kernel groups, out, 2]
        self.register_buffer("zero_bits", kept)  # bf16 [out, groups], of real zeros

    def compressed(self) -> CompressedWeight:
        groups = self.grid.groups(self.in_features)
        scales, zeros = self._scales_and_zeros()[:: len(self.scale_bits) // groups].unbind(-1)
        if self.grid.real_zero:
            zeros = self.zero_bits.view(torch.bfloat16).clone()
        else:
            zeros = self._zero_codes(scales, zeros).t().contiguous()
        return CompressedWeight(self.grid, self._unpack(), scales.t().contiguous(), zeros)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        if self._has_own_kernel(x.shape[0]):
            return native.int4_row(x, self.packed, self._scales_and_zeros(), self.bias)
        if self._is_words():
            return gpu.kernels().multiply_int4(x, self.packed, self._scales_and_zeros(), self.bias)
        group = self.in_features // len(self.scale_bits)
        out = _kernel_of(x)(x.contiguous(), self.packed, group, self._scales_and_zeros())
        return out if self.bias is None else out.add_(self.bias)

    def expand_multiply(self, x: torch.Tensor) -> torch.Tensor:
        if not self._is_words():
            return int4_blocks.expand_multiply(x, self.packed, self._scales_and_zeros(), self.bias)
        out, step = x.new_empty(len(x), self.out_features), channels_at_once(self.in_features, x.device)
        scratch = x.new_empty(min(step, self.out_features), self.in_features)
        for start in range(0, self.out_features, step):
            part = slice(start, min(start + step, self.out_features))
            weight = scratch[: part.stop - start]
            gpu.kernels().expand_int4(self.packed, self._scales_and_zeros(), start, weight)
            out[:, part] = F.linear(x, weight, None if self.bias is None else self.bias[part])
        return out

    def runs_packed(self, rows: int) -> bool:
        if self._is_words():
            return rows <= self.packed_rows_gpu
        if rows == 1 or self.packed.device.type != "cpu" or int4_blocks.block_rows() is None:
            return True
        if int4_blocks.multiplies_natively():
            return rows <= self.packed_rows_tiled
        return rows <= (self.packed_rows if int4_blocks.expands_natively() else self.packed_rows_without)

    def row_kernel(self) -> native_blocks.RowKernel | None:
        if not self._has_own_kernel(1):
            return None
        shape, group = (self.out_features, self.in_features), self.in_features // len(self.scale_bits)
        return native_blocks.RowKernel(self.own_kernel, shape, group, self.packed, self._scales_and_zeros())

    def _has_own_kernel(self, rows: int) -> bool:
        return rows == 1 and int4_blocks.block_rows() == 64 and native.takes(self.packed.device, self.out_features, 64)

    def _is_words(self) -> bool:
        """Whether codes are in the order of our kernels on a GPU."""
        return self.packed.is_cuda and self.packed.dim() == 2

    def kernel(self, rows: int) -> str:
        if self._is_words():
            return "packed int4 (own Triton kernel)" if self.runs_packed(rows) else "int4 to bf16 (own Triton kernel), then matmul"
        if self._has_own_kernel(rows):
            return "packed int4 (own kernel)"
        if not self.runs_packed(rows):
            if int4_blocks.multiplies_natively():
                return "int4 blocks dequantized to bf16 in the matmul (AMX, own kernel)"
            own = "our own" if int4_blocks.expands_natively() else f"torch operators, {native.missing()}"
            return f"int4 blocks dequantized to bf16 ({own}), then matmul"
        name = "_weight_int4pack_mm_for_cpu" if self.packed.device.type == "cpu" else "_weight_int4pack_mm"
        many = ", whose layout is not readable here, for any number of rows" if rows > self.packed_rows else ""
        return f"packed int4 (torch {name}{many})"

    def _scales_and_zeros(self) -> torch.Tensor:
        return self.scale_bits.view(torch.bfloat16)

    def _zero_codes(self, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        steps = (zeros / scales).round_()  # within 1/30 of a whole number, even in bf16
        return steps.neg_().add_(self.grid.levels // 2).to(torch.uint8)

    def _pack(self, codes: torch.Tensor, group: int) -> torch.Tensor:
        """Codes `[out, in]` in the order that the kernel reads, of `group` input channels to a scale."""
        moved = MIDDLE - self.grid.levels // 2
        return _pack(codes + moved if moved else codes.contiguous(), group)

    def _unpack(self) -> torch.Tensor:
        """The inverse of `_pack`: uint8 `[out, in]`."""
        moved = MIDDLE - self.grid.levels // 2
        return self._codes() - moved if moved else self._codes()

    def _codes(self) -> torch.Tensor:
        """uint8 `[out, in]`, as they were moved.

        Where the layout is unknown, ask the kernel: identity times codes, scale 1, zero 0.
        """
        if self.packed.device.type == "cpu" and int4_blocks.block_rows() is not None:
            return int4_blocks.unpack(self.packed)
        if self._is_words():
            return gpu.kernels().unpack_int4(self.packed, self.in_features // len(self.scale_bits))
        neutral = torch.zeros_like(self._scales_and_zeros())
        neutral[..., 0] = 1
        columns = []
        for start in range(0, self.in_features, 256):
            width = min(256, self.in_features - start)
            unit = neutral.new_zeros(width, self.in_features)
            unit[torch.arange(width), start + torch.arange(width)] = 1
            codes = _kernel_of(unit)(unit, self.packed, self.in_features // len(neutral), neutral)  # [width, out]
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
        real = 2 * grid.groups(in_features) if grid.real_zero else 0
        return out_features * (in_features // 2 + 4 * in_features // _kernel_group(grid, in_features) + real)


def _kernel_group(grid: Grid, in_features: int) -> int | None:
    """The largest group the kernels know that divides the grid's; None if there is none."""
    size = in_features // grid.groups(in_features)
    return next((group for group in GROUPS if size % group == 0), None)


def _kernel_of(x: torch.Tensor):
    ops = torch.ops.aten
    return ops._weight_int4pack_mm_for_cpu if x.device.type == "cpu" else ops._weight_int4pack_mm


def _pack(codes: torch.Tensor, group: int) -> torch.Tensor:
    """Order codes `[out, in]` as the kernel of their device reads them."""
    if codes.device.type == "cpu":
        return int4_blocks.pack(codes)
    if codes.is_cuda and gpu.kernels() and gpu.kernels().slice_of(codes.shape[1], group):
        return gpu.kernels().pack_int4(codes, group)
    pairs = codes[:, ::2] << 4 | codes[:, 1::2]  # [out, in / 2]
    tiles = next(tiles for tiles in (8, 4, 2) if codes.shape[1] % (16 * tiles) == 0)
    return torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), tiles)
