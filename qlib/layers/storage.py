"""Codes at their true size: how a compressed weight is laid out in a checkpoint, and in a layer without a kernel.

Codes are a stream of `bits` bits each, the first code in the lowest bits. A row of the weight starts at a whole byte.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F

from qlib.errors import UserError
from qlib.layers import native_rounding
from qlib.quantize.grid import CompressedWeight, Grid

__all__ = [
    "pack_bits", "unpack_bits", "packed_width", "to_tensors", "from_tensors", "expected_tensors", "stored_bytes"
]  # fmt: skip

#: Scales are bf16 but for these.
SCALE_TYPES = {"mxfp4": torch.float8_e8m0fnu, "nvfp4": torch.float8_e4m3fn}


def packed_width(count: int, bits: int) -> int:
    """Bytes that `count` codes take."""
    return -(-count * bits // 8)


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack uint8 codes `[rows, count]`, each below 2**bits, into uint8 `[rows, packed_width(count, bits)]`."""
    if bits == 8:
        return codes.contiguous()
    count = codes.shape[1]
    if bits == 4 and count % 2 == 0 and native_rounding.takes(codes, torch.uint8):
        return native_rounding.join_pairs(codes)
    per, width = _word(bits)
    codes = F.pad(codes, (0, -count % per)).view(len(codes), -(-count // per), per)  # [rows, words, codes of a word]
    words = codes[..., 0].to(torch.int64 if per * bits > 8 else torch.uint8, copy=True, memory_format=torch.contiguous_format)
    for index in range(1, per):
        words |= codes[..., index].to(words.dtype) << (index * bits)
    packed = words[..., None].view(torch.uint8)[..., :width]  # a word's low bytes come first
    return packed.flatten(1)[:, : packed_width(count, bits)].contiguous()


def unpack_bits(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The inverse of `pack_bits`: uint8 codes `[rows, count]`."""
    if bits == 8:
        return packed
    if bits == 4 and count == 2 * packed.shape[1] and native_rounding.takes(packed, torch.uint8):
        return native_rounding.split_pairs(packed)
    per, width = _word(bits)
    packed = F.pad(packed, (0, -packed.shape[1] % width))
    packed = packed.view(len(packed), packed.shape[1] // width, width)  # [rows, words, bytes of a word]
    words = packed[..., 0] if width == 1 else F.pad(packed, (0, 8 - width)).view(torch.int64)[..., 0]
    codes = torch.empty(*words.shape, per, dtype=torch.uint8, device=packed.device)
    for index in range(per):
        codes[..., index] = (words >> (index * bits)) & (2**bits - 1)
    return codes.flatten(1)[:, :count].contiguous()


def _word(bits: int) -> tuple[int, int]:
    """The least whole number of bytes that holds whole codes: codes and bytes of such a word."""
    return (8 // bits, 1) if 8 % bits == 0 else (8, bits)


def to_tensors(compressed: CompressedWeight) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of a weight.

    Returns:
        codes: uint8 `[out, in * bits / 8]`. scales: in the type of the format, `[out, groups]`, or `[1]` where the tensor
        has one. zeros, where the grid has them: uint8, all `out * groups` of them as one stream, or bf16
        `[out, groups]`. tensor_scale: fp32 `[1]`, of nvfp4.
    """
    grid = compressed.grid
    scales = compressed.scales[0].clone() if grid.group_size == "tensor" else compressed.scales.contiguous()
    tensors = {"codes": pack_bits(compressed.codes, grid.bits), "scales": scales}
    if grid.real_zero:
        tensors["zeros"] = compressed.zeros.contiguous()
    elif grid.has_zeros:
        tensors["zeros"] = pack_bits(compressed.zeros.reshape(1, -1), grid.bits)[0]
    if compressed.tensor_scale is not None:
        tensors["tensor_scale"] = compressed.tensor_scale.reshape(1)
    return tensors


def expected_tensors(grid: Grid, shape: tuple[int, int]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Type and shape of every tensor that `to_tensors` returns for a weight `[out, in]`."""
    out_features, in_features = shape
    groups = (out_features, grid.groups(in_features))
    expected = {
        "codes": (torch.uint8, (out_features, packed_width(in_features, grid.bits))),
        "scales": (SCALE_TYPES.get(grid.element, torch.bfloat16), (1,) if grid.group_size == "tensor" else groups),
    }
    if grid.real_zero:
        expected["zeros"] = (torch.bfloat16, groups)
    elif grid.has_zeros:
        expected["zeros"] = (torch.uint8, (packed_width(groups[0] * groups[1], grid.bits),))
    if grid.element == "nvfp4":
        expected["tensor_scale"] = (torch.float32, (1,))
    return expected


def from_tensors(grid: Grid, tensors: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> CompressedWeight:
    """The inverse of `to_tensors`, bit by bit. `shape` is the weight's `[out, in]`.

    Raises:
        UserError: a tensor is missing, or has another shape or type than grid and `shape` ask for.
    """
    out_features, in_features = shape
    for name, (dtype, wanted) in expected_tensors(grid, shape).items():
        tensor = tensors.get(name)
        if tensor is None:
            raise UserError(f"'{name}' is missing beside {', '.join(tensors)} of an {grid.name} weight")
        if tensor.dtype != dtype or tuple(tensor.shape) != wanted:
            raise UserError(
                f"'{name}' of an {grid.name} weight {list(shape)} is {tensor.dtype} {list(tensor.shape)}, "
                f"expected {dtype} {list(wanted)}"
            )
    codes, scales = unpack_bits(tensors["codes"], grid.bits, in_features), tensors["scales"]
    if grid.group_size == "tensor":
        scales = scales.expand(out_features, 1)
    if grid.real_zero:
        zeros = tensors["zeros"]
    elif grid.has_zeros:
        zeros = unpack_bits(tensors["zeros"][None], grid.bits, scales.numel()).view(scales.shape)
    else:
        middle = grid.levels // 2 if grid.element == "int" else 0
        zeros = torch.full(scales.shape, middle, dtype=torch.uint8, device=scales.device)
    factor = tensors["tensor_scale"][0] if grid.element == "nvfp4" else None
    return CompressedWeight(grid, codes, scales, zeros, factor)


def stored_bytes(grid: Grid, out_features: int, in_features: int) -> int:
    """Bytes of what `to_tensors` returns for a weight of this shape."""
    tensors = expected_tensors(grid, (out_features, in_features)).values()
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in tensors)
