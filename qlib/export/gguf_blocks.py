"""Weights as blocks of GGUF: 32 of a row with a scale of their own, in the very values they have, or not at all.

Groups of any multiple of 32 fit: the blocks of a group repeat its scale, which costs bits and no accuracy.
"""

from dataclasses import replace

import numpy as np
import torch
from gguf import GGMLQuantizationType, quants

from qlib.errors import UserError
from qlib.export.gguf_file import BLOCK
from qlib.quantize.grid import CompressedWeight, scale_values

__all__ = ["blocks_of_weight", "encode", "to_numpy"]

ROUNDING = 1 / 64  # of a step: what Q4_1's minimum, rounded to fp16, may move a weight; our int4 kernel does as much
Type = GGMLQuantizationType


def encode(
    weight: torch.Tensor | CompressedWeight, order: torch.Tensor | None, dense: str, requantize: bool
) -> tuple[Type, np.ndarray, float]:
    """Type, data as GGUF stores it, and how far values move, of a weight whose rows are taken in `order`.

    Args:
        dense, requantize: see `qlib.export.gguf.export`.

    Raises:
        UserError: GGUF cannot hold it.
    """
    if isinstance(weight, CompressedWeight):
        if order is not None:
            taken = {part: getattr(weight, part)[order] for part in ("codes", "scales", "zeros")}
            weight = replace(weight, **taken)
        try:
            return blocks_of_weight(weight)
        except UserError:
            if not requantize or weight.codes.shape[1] % BLOCK:
                raise
        values, steps = weight.dequantize(), scale_values(weight.scales, weight.tensor_scale)[..., None]
        data = quants.quantize(to_numpy(values), Type.Q8_0)
        moved = np.abs(quants.dequantize(data, Type.Q8_0) - to_numpy(values)).reshape(*steps.shape[:2], -1)
        return Type.Q8_0, data, float((moved / to_numpy(steps)).max())
    weight = weight if order is None else weight[order]
    if weight.dim() == 1 or dense == "f32":
        return Type.F32, to_numpy(weight), 0.0
    if dense == "bf16":
        return Type.BF16, quants.quantize(to_numpy(weight), Type.BF16), 0.0
    if not torch.isfinite(half := weight.half()).all():
        raise UserError("dense: f16 cannot hold weights above 65504; allowed here: bf16, f32")
    return Type.F16, half.cpu().numpy(), 0.0


def blocks_of_weight(weight: CompressedWeight) -> tuple[Type, np.ndarray, float]:
    """The first type of GGUF that holds a weight's values, its blocks, and how far values move, in steps.

    Q4_0 is (q - 8) d, q of 4 bits; Q8_0 is q d, q an int8; Q4_1 is q d + m; d and m are fp16. MXFP4 is our own mxfp4.
    Fewer bits go into the next wider type: no smaller one has blocks of 32.

    Returns:
        type, uint8 `[out, bytes]`, and the greatest distance; it is 0 but for Q4_1, whose m = -zero x scale is rounded.

    Raises:
        UserError: none does; it says why.
    """
    grid, (rows, columns) = weight.grid, weight.codes.shape
    size = columns // weight.scales.shape[1]
    if columns % BLOCK or size % BLOCK:
        what = f"group_size: {size}" if columns % BLOCK == 0 else f"a width of {columns}"
        raise UserError(f"{what} is no multiple of {BLOCK}, which a block of GGUF holds")
    blocks = weight.codes.view(rows, -1, BLOCK).cpu()  # [out, blocks, 32]
    if grid.element == "mxfp4":
        return Type.MXFP4, _join(weight.scales.cpu().view(torch.uint8)[..., None], _nibbles(blocks)), 0.0
    if grid.element != "int":
        raise UserError(f"GGUF has no type for {grid.name}; allowed: integer grids and mxfp4")
    scales, zeros = (x.cpu().float().repeat_interleave(size // BLOCK, dim=1) for x in (weight.scales, weight.zeros))
    d, zeros = scales.half(), zeros[..., None]
    if not torch.equal(d.float(), scales):
        wrong = scales[d.float() != scales][0].item()
        raise UserError(f"fp16, the type of GGUF's scales, cannot hold a scale of {wrong:.3g}")
    d, steps = d.view(torch.uint8).view(rows, -1, 2), blocks.float() - zeros
    whole = bool((zeros == zeros.round()).all())
    if whole and steps.min() >= -8 and steps.max() <= 7:
        return Type.Q4_0, _join(d, _nibbles((steps + 8).to(torch.uint8))), 0.0
    if grid.bits <= 4:
        low = -zeros[..., 0] * scales
        m = low.half()
        moved = ((m.float() - low).abs() / scales).max().item()
        if not moved <= ROUNDING:
            raise UserError(f"fp16 moves a weight by {moved:.2g} steps in Q4_1; allowed: at most {ROUNDING:.2g}")
        return Type.Q4_1, _join(d, m.view(torch.uint8).view(rows, -1, 2), _nibbles(blocks)), moved
    if whole and steps.min() >= -128 and steps.max() <= 127:
        return Type.Q8_0, _join(d, steps.to(torch.int8).view(torch.uint8)), 0.0
    raise UserError(f"Q8_0 has no zero, which {grid.bits} bits with one for each group need; allowed: symmetric: true")


def _nibbles(codes: torch.Tensor) -> torch.Tensor:
    """`[..., 32]` codes of 4 bits to `[..., 16]` bytes: the first half of a block in the low bits."""
    low, high = codes.unflatten(-1, (2, -1)).unbind(-2)
    return low | high << 4


def _join(*parts: torch.Tensor) -> np.ndarray:
    """Bytes of each block `[out, blocks, any]` to the bytes of each row `[out, all]`."""
    return torch.cat(parts, dim=-1).flatten(1).numpy()


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The tensor in fp32."""
    return tensor.detach().float().cpu().contiguous().numpy()
