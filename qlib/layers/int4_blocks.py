"""The order in which torch's int4 CPU kernel keeps codes, and how to multiply many rows with them.

Output channels come in blocks (64 with AVX-512, 32 with AVX2). A block is `[in, block / 2]` bytes: byte j of an input
channel holds output channel j in its low half and channel j + block / 2 in its high half. The last block, where it is
not full, holds channels 2j and 2j + 1 instead. Nothing documents this, so `block_rows` checks it against torch itself.
"""

import ctypes
from functools import lru_cache

import torch
import torch.nn.functional as F

from qlib.layers import native, native_rounding
from qlib.layers.base import SCRATCH_BYTES, channels_at_once

__all__ = ["pack", "unpack", "block_rows", "expands_natively", "multiplies_natively", "expand_multiply"]


def pack(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes `[out, in]` to uint8 `[out, in / 2]` in the kernel's order; torch's own way is slower by half."""
    rows, (out_features, width) = block_rows(), codes.shape
    packed = torch.empty(out_features, width // 2, dtype=torch.uint8)
    full = out_features // rows * rows if rows else 0
    if full and rows == 64 and native_rounding.takes(codes, torch.uint8):
        native_rounding.join_blocks(codes[:full], packed[:full])
    elif full:
        halves = codes[:full].view(-1, 2, rows // 2, width)
        both = halves[:, 1] << 4
        packed[:full].view(-1, width, rows // 2).copy_(both.bitwise_or_(halves[:, 0]).transpose(1, 2))
    if full < out_features:
        packed[full:] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes[full:].int(), 1)
    return packed


def unpack(packed: torch.Tensor, rows: int | None = None) -> torch.Tensor:
    """The inverse of `pack`. `rows` is the size of a block, by default the one of this machine."""
    rows = rows or block_rows()
    (out_features, half), full = packed.shape, len(packed) // rows * rows
    codes = torch.empty(out_features, 2 * half, dtype=torch.uint8)
    if rows == 64 and native_rounding.takes(packed, torch.uint8):
        native_rounding.split_blocks(packed[:full], codes[:full])
    else:
        blocks = packed[:full].view(-1, 2 * half, rows // 2)  # [blocks, in, bytes]
        ordered = codes[:full].view(-1, 2, rows // 2, 2 * half)
        ordered[:, 0], ordered[:, 1] = (blocks & 15).transpose(1, 2), (blocks >> 4).transpose(1, 2)
    if full < out_features:
        last = packed[full:].reshape(2 * half, -1)  # [in, bytes]
        codes[full::2], codes[full + 1 :: 2] = (last & 15).t(), (last >> 4).t()
    return codes


def block_rows() -> int | None:
    """Output channels in a block on this machine; None if torch packs in an order this module does not know."""
    return _find_block_rows()


block_rows._dynamo_marked_constant = True  # torch.compile takes its answer, and does not look inside


@lru_cache(maxsize=None)
def _find_block_rows() -> int | None:
    random = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (208, 64), generator=random, dtype=torch.int32)  # the last block is not full
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    except RuntimeError:
        return None
    return next((rows for rows in (64, 32, 16, 128) if torch.equal(unpack(packed, rows), codes.to(torch.uint8))), None)


def expands_natively() -> bool:
    """Whether our own kernel dequantizes blocks here."""
    return block_rows() == 64 and not native.missing() and _tile_channels() is not None


expands_natively._dynamo_marked_constant = True


def multiplies_natively() -> bool:
    """Whether our own kernel multiplies what it has dequantized, on tile registers."""
    return block_rows() == 64 and native.has_amx()


multiplies_natively._dynamo_marked_constant = True


@lru_cache(maxsize=None)
def _tile_channels() -> int | None:
    """Channels that oneDNN keeps side by side, in an order `native.int4_expand` writes: undocumented too, so asked.

    64 on processors with AVX-512, 32 on those with AMX; None: another order.
    """
    ops = torch.ops.mkldnn
    if not (hasattr(ops, "data_ptr") and ops._is_mkldnn_bf16_supported()):
        return None
    weight = torch.arange(128 * 96, dtype=torch.int16).view(128, 96)
    tile = ops._reorder_linear_weight(weight.view(torch.bfloat16), None)
    if ops._nbytes(tile) != 2 * weight.numel():
        return None
    held = torch.frombuffer((ctypes.c_int16 * weight.numel()).from_address(ops.data_ptr(tile)), dtype=torch.int16)
    orders = {wide: weight.view(-1, wide, 48, 2).transpose(1, 2).flatten() for wide in (64, 32)}
    return next((wide for wide, order in orders.items() if torch.equal(held, order)), None)


def expand_multiply(
    x: torch.Tensor, packed: torch.Tensor, scales_zeros: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Multiply bf16 `x [rows, in]` with packed codes, some blocks at a time, never transposing a weight.

    Args:
        packed: `[out, in / 2]` in the kernel's order.
        scales_zeros: bf16 `[groups, out, 2]`, weight = (code - 8) * scale + zero.

    Returns:
        bf16 `[rows, out]`. The weights are the dequantized ones, rounded to bf16 once.
    """
    size, half = block_rows(), packed.shape[1]
    full = len(packed) // size * size
    out = x.new_empty(len(x), len(packed))
    if full:
        multiply = native.int4_multiply if multiplies_natively() else _multiply_own if expands_natively() else _multiply_eager
        multiply(x, packed[:full], scales_zeros[:, :full].contiguous(), out)
    if full < len(packed):
        codes = unpack(packed[full:], size).view(-1, len(scales_zeros), 2 * half // len(scales_zeros))
        scales, zeros = scales_zeros[:, full:].transpose(0, 1)[..., None].float().unbind(2)  # [channels, groups, 1]
        out[:, full:] = F.linear(x, ((codes.float() - 8) * scales + zeros).flatten(1).bfloat16())
    return out if bias is None else out.add_(bias)


def _multiply_own(x: torch.Tensor, packed: torch.Tensor, scales_zeros: torch.Tensor, out: torch.Tensor) -> None:
    """Fill the columns of whole blocks of `out [rows, out]`: one tile of weights after the other, in the cache."""
    # measured: with few rows making room costs most, with many reading them again for every tile
    width = min(len(packed), channels_at_once(x.shape[1]), max(128, len(x) // 256 * 64))
    for start in range(0, len(packed), width):
        columns = min(width, len(packed) - start)
        if start == 0 or columns < width:
            tile = torch.ops.mkldnn._reorder_linear_weight(x.new_empty(columns, x.shape[1]), None)
        address = torch.ops.mkldnn.data_ptr(tile)
        native.int4_expand(packed, scales_zeros, start, columns, address, _tile_channels())
        out[:, start : start + columns] = torch.ops.mkldnn._linear_pointwise(x, tile, None, "none", [], "")


def _multiply_eager(x: torch.Tensor, packed: torch.Tensor, scales_zeros: torch.Tensor, out: torch.Tensor) -> None:
    """The same with torch's operators."""
    size, (full, half) = block_rows(), packed.shape
    scales, zeros = scales_zeros.unbind(-1)
    count = max(2, SCRATCH_BYTES // (4 * half * size))  # blocks at a time
    scratch = _Scratch(2 * half, min(count * size, full) // 2, len(x))
    for start in range(0, full, count * size):
        part = slice(start, min(start + count * size, full))
        weight = _expand(packed[part].view(-1, 2 * half, size // 2), scales[:, part], zeros[:, part], scratch)
        ordered = out[:, part].unflatten(1, (-1, 2, size // 2))  # [rows, blocks, low or high, bytes]
        for index in (0, 1):
            product = torch.mm(x, weight[index], out=scratch.product[:, : weight.shape[2]])
            ordered[:, :, index] = product.unflatten(1, (-1, size // 2))


class _Scratch:
    """Memory for `width` bytes of every input channel, which is two output channels each; used over and over."""

    def __init__(self, in_features: int, width: int, rows: int) -> None:
        self.bytes = torch.empty(in_features, width, dtype=torch.uint8)
        self.codes = torch.empty(2, in_features, width, dtype=torch.uint8)
        self.weight = torch.empty(2, in_features, width, dtype=torch.bfloat16)
        self.product = torch.empty(rows, width, dtype=torch.bfloat16)


def _expand(blocks: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, scratch: _Scratch) -> torch.Tensor:
    """Codes of some blocks `[blocks, in, bytes]` to bf16 weights `[low or high, in, blocks * bytes]`."""
    count, in_features, width = blocks.shape
    both = slice(0, count * width)
    rows, codes, weight = scratch.bytes[:, both], scratch.codes[..., both], scratch.weight[..., both]
    rows.unflatten(1, (count, width)).copy_(blocks.transpose(0, 1))  # [in, blocks * bytes]
    torch.bitwise_and(rows, 15, out=codes[0])
    torch.bitwise_right_shift(rows, 4, out=codes[1])
    scales, zeros = (
        tensor.unflatten(1, (count, 2, width)).permute(2, 0, 1, 3).reshape(2, len(tensor), 1, -1)
        for tensor in (scales, zeros)
    )  # [low or high, groups, 1, blocks * bytes]
    grouped = (2, scales.shape[1], in_features // scales.shape[1], count * width)
    steps = codes.view(torch.int8).sub_(8).view(grouped)
    weight.view(grouped).copy_(torch.addcmul(zeros.float(), steps, scales.float()))
    return weight
