"""Pruned weights at their true size in a checkpoint: a bit for every weight, and what stayed, one after the other.

On disk alone: in memory and for every kernel the zeros are there again. Where few weights went the bits cost more than they
save; the weight is then stored as if it were dense.
"""

import math
from collections.abc import Mapping

import torch
from torch import nn

from qlib.errors import UserError
from qlib.layers.storage import expected_tensors, from_tensors, pack_bits, packed_width, stored_bytes, to_tensors, unpack_bits
from qlib.quantize.grid import CompressedWeight, Grid

__all__ = ["count_survivors", "sparse_tensors", "sparse_codes", "sparse_floats", "sparse_bytes", "pays"]

FLOAT_BITS = 16


def _stayed(weight: torch.Tensor | CompressedWeight) -> torch.Tensor:
    """bool `[out, in]`: which weights are not 0. Zeros come back as +0, whatever their sign was."""
    return (weight if isinstance(weight, torch.Tensor) else weight.dequantize()) != 0


def count_survivors(linear: nn.Module) -> int:
    """Weights of a linear, packed or bf16, that are stored if its zeros are not."""
    return int(_stayed(linear.compressed() if hasattr(linear, "compressed") else linear.weight.detach()).sum())


def sparse_tensors(weight: torch.Tensor | CompressedWeight) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of a bf16 weight `[out, in]`, or of one on a grid.

    Returns:
        mask: uint8 `[out, in / 8]`, the first weight in the lowest bit. values: bf16 `[survivors]`; or codes: uint8, a stream
        of `bits` bits for each survivor, beside scales and zeros as `to_tensors` has them. Row by row in both.
    """
    stayed = _stayed(weight)
    mask = {"mask": pack_bits(stayed.to(torch.uint8), 1)}
    if isinstance(weight, torch.Tensor):
        return mask | {"values": weight[stayed]}
    return to_tensors(weight) | mask | {"codes": pack_bits(weight.codes[stayed][None], weight.grid.bits)[0].clone()}


def sparse_codes(grid: Grid, tensors: Mapping[str, torch.Tensor], shape: tuple[int, int], survivors: int) -> CompressedWeight:
    """The inverse of `sparse_tensors` for a weight on a grid, bit by bit.

    Raises:
        UserError: a tensor is missing, or does not fit grid, shape and number of survivors.
    """
    stayed = _unpacked_mask(tensors, shape, survivors)
    wanted = (packed_width(survivors, grid.bits),)
    _check("codes", tensors, torch.uint8, wanted)
    dense = torch.zeros(expected_tensors(grid, shape)["codes"][1], dtype=torch.uint8)
    weight = from_tensors(grid, {**tensors, "codes": dense}, shape)
    weight.codes = torch.zeros(shape, dtype=torch.uint8)
    if grid.element == "int":
        weight.codes += weight.zeros.repeat_interleave(shape[1] // weight.zeros.shape[1], dim=1)
    weight.codes[stayed] = unpack_bits(tensors["codes"][None], grid.bits, survivors)[0]
    return weight


def sparse_floats(tensors: Mapping[str, torch.Tensor], shape: tuple[int, int], survivors: int) -> torch.Tensor:
    """The inverse of `sparse_tensors` for a bf16 weight `[out, in]`.

    Raises:
        UserError: as `sparse_codes`.
    """
    stayed = _unpacked_mask(tensors, shape, survivors)
    _check("values", tensors, torch.bfloat16, (survivors,))
    weight = torch.zeros(shape, dtype=torch.bfloat16)
    weight[stayed] = tensors["values"]
    return weight


def _unpacked_mask(tensors: Mapping[str, torch.Tensor], shape: tuple[int, int], survivors: int) -> torch.Tensor:
    _check("mask", tensors, torch.uint8, (shape[0], packed_width(shape[1], 1)))
    stayed = unpack_bits(tensors["mask"], 1, shape[1]).bool()
    if (found := int(stayed.sum())) != survivors:
        raise UserError(f"'mask' of a pruned weight {list(shape)} keeps {found} weights, expected {survivors}")
    return stayed


def _check(name: str, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = tensors.get(name)
    if tensor is None or tensor.dtype != dtype or tuple(tensor.shape) != shape:
        found = "missing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
        raise UserError(f"'{name}' of a pruned weight is {found}, expected {dtype} {list(shape)}")


def sparse_bytes(grid: Grid | None, shape: tuple[int, int], survivors: float) -> int:
    """Bytes that a weight `[out, in]` of which so many stayed takes on disk; grid None: bf16. The dense form if that is less."""
    dense = 2 * math.prod(shape) if grid is None else stored_bytes(grid, *shape)
    return dense - max(0, _saved_bytes(grid, shape, survivors))


def pays(grid: Grid | None, shape: tuple[int, int], survivors: int) -> bool:
    """Whether storing the survivors alone takes less. Zeros that are no codes (HQQ) cannot be left out."""
    return _saved_bytes(grid, shape, survivors) > 0


def _saved_bytes(grid: Grid | None, shape: tuple[int, int], survivors: float) -> int:
    if grid is not None and grid.real_zero:
        return 0
    bits = FLOAT_BITS if grid is None else grid.bits
    mask, stayed = shape[0] * packed_width(shape[1], 1), packed_width(round(survivors), bits)
    return shape[0] * packed_width(shape[1], bits) - mask - stayed
