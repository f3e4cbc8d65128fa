"""8 bits, on our kernels or torch's weight-only one, and W8A8, where the activations are rounded as well."""

import torch
import torch.nn.functional as F
from torch import nn

from qlib.layers import gpu, int8_tiles, native, native_blocks
from qlib.layers.base import PackedLinear, channels_at_once, hold_bits, round_tokens
from qlib.quantize.grid import CompressedWeight, Grid

__all__ = ["Int8Linear", "Int8DynamicLinear"]

#: Torch's kernel reads past the end of rows that are not whole vectors: wrong sums, or a crash. Ours want whole groups.
VECTOR = 32


class Int8Linear(PackedLinear):
    """Codes of one byte: 8 bits, and 5 and 6 bits, for which there is no kernel of their own.

    The kernels know no zero. With c' = code - middle, a weight is c' * scale + (middle - zero) * scale, so the product
    gains (sum of a group's activations) * offset, offset = (middle - zero) * scale kept in fp32, where it is exact.
    """

    #: Measured: for more rows converting codes to bf16 and multiplying is faster, on a CPU, on its tile registers, on a GPU.
    packed_rows, packed_rows_tiled, packed_rows_gpu = 20, 9, 64
    own_kernel = "int8_rows"

    def __init__(self, compressed: CompressedWeight, bias: nn.Parameter | None = None) -> None:
        super().__init__(compressed.grid, tuple(compressed.codes.shape), bias)
        scales, middle = compressed.scales, self.grid.levels // 2
        offsets = None if self.grid.symmetric else hold_bits((middle - compressed.zeros.float()) * scales.float())
        self.register_buffer("codes", (compressed.codes - middle).view(torch.int8))  # code - middle, see _order
        self.register_buffer("scale_bits", hold_bits(scales))  # bf16 [out, groups]
        self.register_buffer("offset_bits", offsets)  # fp32 [out, groups]
        self._order()

    def _order(self) -> None:
        """Keep codes as tiles where our kernel runs, and `[out, in]` everywhere else."""
        tiles, tiled = self._own_kernel_fits(), self.codes.dim() == 4
        if tiles != tiled:
            self.codes = int8_tiles.tile(self.codes) if tiles else int8_tiles.untile(self.codes)

    def _apply(self, fn, recurse: bool = True):
        """Called by ``.to``, ``.cuda`` and the like: another kind of device wants another order."""
        super()._apply(fn, recurse)
        self._order()
        return self

    @staticmethod
    def fits(grid: Grid, in_features: int) -> bool:
        """Whether codes of this grid are kept as bytes."""
        return grid.element == "int" and grid.bits in (5, 6, 8) and not grid.real_zero and not grid.activations

    def compressed(self) -> CompressedWeight:
        middle = self.grid.levels // 2
        zeros = torch.full(self._scales.shape, middle, dtype=torch.uint8, device=self.codes.device)
        if self._offsets is not None:
            zeros = (middle - self._offsets / self._scales.float()).round().to(torch.uint8)
        codes = int8_tiles.untile(self.codes).view(torch.uint8) + middle
        return CompressedWeight(self.grid, codes, self._scales.clone(), zeros)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        if self._has_own_kernel():
            return native.int8_rows(x, self.codes, self._scales, self._offsets, self.bias)
        if x.is_cuda and gpu.kernels():
            return gpu.kernels().multiply_int8(x, self.codes, self._scales, self._offsets, self.bias)
        out = torch.ops.aten._weight_int8pack_mm(x.contiguous(), self.codes, self._scales[:, 0])
        if self._offsets is not None:
            sums = x.sum(-1, keepdim=True, dtype=torch.float32)
            out.addcmul_(sums, self._offsets[:, 0])  # computed in fp32, rounded once more
        return out if self.bias is None else out.add_(self.bias)

    def expand_multiply(self, x: torch.Tensor) -> torch.Tensor:
        if self._expands_natively(len(x)):
            return native.int8_multiply(x, self.codes, self._scales, self._offsets, self.bias)
        scales, offsets, groups = self._scales.float(), self._offsets, self._scales.shape[1]
        sums = None if offsets is None else x.unflatten(1, (groups, -1)).sum(-1, dtype=torch.float32)  # [rows, groups]
        out = x.new_empty(len(x), self.out_features)
        step = channels_at_once(self.in_features, x.device)
        scratch = x.new_empty(min(step, self.out_features), self.in_features)
        for start in range(0, self.out_features, step):
            part = slice(start, min(start + step, self.out_features))
            weight = scratch[: part.stop - start]  # whole numbers up to 128: exact in bf16
            if self._has_own_kernel():
                tiles = self.codes[start // int8_tiles.CHANNELS : part.stop // int8_tiles.CHANNELS].transpose(1, 2)
                weight.view(tiles.shape).copy_(tiles)
            elif x.is_cuda and gpu.kernels():
                gpu.kernels().widen(self.codes[part], weight)
            else:
                weight.copy_(self.codes[part])
            if groups > 1:
                weight.unflatten(1, (groups, -1)).mul_(self._scales[part, :, None])
            product = F.linear(x, weight).float()
            if groups == 1:
                product.mul_(scales[part, 0])
            if offsets is not None:
                product.addmm_(sums, offsets[part].t())
            out[:, part] = product if self.bias is None else product.add_(self.bias[part])
        return out

    def runs_packed(self, rows: int) -> bool:
        if self.codes.is_cuda and gpu.kernels():
            return rows <= self.packed_rows_gpu and self._scales.shape[1] == 1
        most = self.packed_rows_tiled if self._expands_natively(rows) else self.packed_rows
        return rows <= most and (self._has_own_kernel() or self._has_torch_kernel())

    def row_kernel(self) -> native_blocks.RowKernel | None:
        if not self._has_own_kernel():
            return None
        shape, group = (self.out_features, self.in_features), self.in_features // self._scales.shape[1]
        return native_blocks.RowKernel(self.own_kernel, shape, group, self.codes, self._scales, self._offsets)

    def kernel(self, rows: int) -> str:
        if not self.runs_packed(rows):
            return f"int8 codes to bf16, then matmul{' (AMX, own kernel)' if self._expands_natively(rows) else ''}"
        if self._has_own_kernel():
            return "int8 weight-only (own kernel)"
        if self.codes.is_cuda and gpu.kernels():
            return "int8 weight-only (own Triton kernel)"
        return f"int8 weight-only (torch _weight_int8pack_mm; no kernel of our own: {native.missing()})"

    def _own_kernel_fits(self) -> bool:
        whole = self.in_features // self._scales.shape[1] % VECTOR == 0 and self.in_features % int8_tiles.WIDTH == 0
        return whole and native.takes(self.codes.device, self.out_features, int8_tiles.CHANNELS)

    def _expands_natively(self, rows: int) -> bool:
        one_group = self._scales.shape[1] == 1
        return self._has_own_kernel() and one_group and native.tiled(rows, self.out_features)

    def _has_own_kernel(self) -> bool:
        return self.codes.dim() == 4

    def _has_torch_kernel(self) -> bool:
        whole = self.in_features % VECTOR == 0 and self._scales.shape[1] == 1
        return whole and _torch_has_kernel(self.codes.device.type)

    @property
    def _scales(self) -> torch.Tensor:
        return self.scale_bits.view(torch.bfloat16).view(self.out_features, -1)

    @property
    def _offsets(self) -> torch.Tensor | None:
        return None if self.offset_bits is None else self.offset_bits.view(torch.float32)

    @staticmethod
    def expected_bytes(grid: Grid, out_features: int, in_features: int) -> int:
        """Bytes resident for a weight of this shape, without bias."""
        return out_features * (in_features + grid.groups(in_features) * (2 if grid.symmetric else 6))


class Int8DynamicLinear(Int8Linear):
    """W8A8: symmetric int8 per output channel, and activations rounded to int8 token by token as they arrive.

    Whole numbers are multiplied and summed exactly (int32), then scaled: out = sum * scale of the token * scale of the
    channel.
    """

    packed_rows = packed_rows_tiled = packed_rows_gpu = 2**31  # however many rows: int8 products are the fastest there are
    own_kernel = "int8_dot"

    @staticmethod
    def fits(grid: Grid, in_features: int) -> bool:
        """Whether weights and activations are such that integers can be multiplied as they are."""
        return grid.activations == "int8" and grid.bits == 8 and grid.symmetric and grid.groups(in_features) == 1

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        if self._has_own_kernel():
            return native.int8_dot(x, self.codes, self._scales, self.bias)
        codes, scales = gpu.round_tokens(x, "int8") if x.is_cuda else round_tokens(x)
        filled = F.pad(codes.to(torch.int8), (0, 0, 0, -len(x) % 32))  # CUDA wants more than 16 rows
        sums = torch._int_mm(filled if x.is_cuda else filled[: len(x)], self.codes.t())[: len(x)]
        out = sums.float().mul_(scales).mul_(self._scales[:, 0])
        return (out if self.bias is None else out.add_(self.bias)).bfloat16()

    def expand_multiply(self, x: torch.Tensor) -> torch.Tensor:
        codes, scales = round_tokens(x)
        return super().expand_multiply((codes * scales).bfloat16())

    def kernel(self, rows: int) -> str:
        if not self.runs_packed(rows):
            return "activations rounded to int8, int8 codes to bf16, then matmul"
        if not self._has_own_kernel():
            why = "" if self.codes.is_cuda else f"; no kernel of our own: {native.missing()}"
            return f"int8 x int8 (torch _int_mm{why})"
        return f"int8 x int8 ({'AMX, ' if native.tiled(rows, self.out_features) else ''}own kernel)"

    def _has_torch_kernel(self) -> bool:
        return self.codes.device.type == "cpu" or (self.in_features % 8 == 0 and self.out_features % 8 == 0)


def _torch_has_kernel(device: str) -> bool:
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device)
    return bool(key) and torch._C._dispatch_has_kernel_for_dispatch_key("aten::_weight_int8pack_mm", key)


_torch_has_kernel._dynamo_marked_constant = True  # torch.compile takes its answer, and does not look inside
