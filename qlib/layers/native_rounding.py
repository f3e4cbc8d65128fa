"""Our own CPU kernels of rounding to nearest and packing: the same bits as torch's operators, in one pass over the memory."""

import torch

from qlib.layers.build import call, missing

__all__ = ["takes", "ranges", "codes", "join_pairs", "split_pairs", "join_blocks", "split_blocks"]


def takes(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernels run on this tensor, which they want to be of `dtype`."""
    return tensor.device.type == "cpu" and tensor.dtype == dtype and tensor.is_contiguous() and not missing()


def ranges(weight: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and greatest of each group of bf16 `weight [out, in]`, and 0 if that lies outside; fp32 `[out, groups]` each."""
    low, high = (torch.empty(len(weight), groups) for _ in range(2))
    call("group_ranges", weight, low, high, low.numel(), weight.shape[1] // groups)
    return low, high


def codes(weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, levels: int, real_zero: bool) -> torch.Tensor:
    """uint8 codes `[out, in]` of bf16 weights; fp32 scales and zeros `[out, groups]`; see `qlib.quantize.grid`."""
    found = torch.empty(weight.shape, dtype=torch.uint8)
    scales, zeros = scales.contiguous(), zeros.contiguous()
    call("group_codes", weight, scales, zeros, found, scales.numel(), weight.shape[1] // scales.shape[1], levels, int(real_zero))
    return found


def join_pairs(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes `[rows, count]` below 16, count even, to `[rows, count / 2]` bytes, the first of two in the low half."""
    packed = codes.new_empty(len(codes), codes.shape[1] // 2)
    call("join_pairs", codes, packed, packed.numel())
    return packed


def split_pairs(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `join_pairs`."""
    codes = packed.new_empty(len(packed), 2 * packed.shape[1])
    call("split_pairs", packed, codes, packed.numel())
    return codes


def join_blocks(codes: torch.Tensor, packed: torch.Tensor) -> None:
    """Write uint8 codes `[out, in]` below 16, out in multiples of 64, to `packed [out, in / 2]` in blocks (int4_blocks.py)."""
    call("join_blocks", codes, packed, *codes.shape)


def split_blocks(packed: torch.Tensor, codes: torch.Tensor) -> None:
    """The inverse of `join_blocks`."""
    call("split_blocks", packed, codes, *codes.shape)
