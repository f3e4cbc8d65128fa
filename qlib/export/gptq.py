"""GPTQ checkpoints, which gptqmodel, transformers and vLLM load: the very codes, zeros and scales of our packed layers.

Codes are packed along the input channels and zeros along the output channels, in 32-bit words. The first version of the
format stores zeros less 1, which has no place for a zero code of 0; asymmetric grids are therefore written as version 2.
"""

from typing import Any, Mapping, Sequence

import torch

from qlib.errors import UserError
from qlib.export.words import pack_words
from qlib.layers import PackedLinear
from qlib.quantize.formats import Grid
from qlib.quantize.grid import CompressedWeight

__all__ = ["layer_tensors", "quantization_config", "CONFIG_FILE"]

CONFIG_FILE = "quantize_config.json"  # where auto-gptq looks for the entry of config.json, and nowhere else
WIDTHS = (2, 3, 4, 8)
WORD = 32
HEAD = "lm_head"


def layer_tensors(compressed: CompressedWeight) -> dict[str, torch.Tensor]:
    """What the checkpoint holds in the place of a linear's weight `[out, in]`.

    Returns:
        qweight: int32 `[in * bits / 32, out]`. qzeros: int32 `[groups, out * bits / 32]`. scales: fp16 `[groups, out]`.
        g_idx: int32 `[in]`, the group of each input channel.

    Raises:
        UserError: a scale is no fp16 number.
    """
    grid, scales = compressed.grid, compressed.scales.half()
    if not torch.equal(scales.float(), compressed.scales.float()):
        raise UserError("gptq: a scale is too small or too large for fp16, the type of scales in this format")
    zeros = compressed.zeros - (1 if grid.symmetric else 0)  # version 1 of the format counts zeros from 1
    in_features, groups = compressed.codes.shape[1], scales.shape[1]
    return {
        "qweight": pack_words(compressed.codes, grid.bits).t().contiguous(),
        "qzeros": pack_words(zeros.t(), grid.bits),
        "scales": scales.t().contiguous(),
        "g_idx": (torch.arange(in_features) // (in_features // groups)).int(),
    }


def quantization_config(layers: Mapping[str, PackedLinear], others: Sequence[str]) -> dict[str, Any]:
    """The entry of config.json.

    Args:
        others: names of linears that stay as they are.

    Raises:
        UserError: the format has no way to say what the layers hold; it says which and why.
    """
    grids = {layer.grid for layer in layers.values()}
    if len(grids) != 1:
        names = ", ".join(sorted(grid.name for grid in grids)) or "none"
        raise UserError(f"gptq: all packed layers must have one format, these have {names}; use compressed_tensors")
    if left := [name for name in others if name != HEAD]:
        raise UserError(f"gptq: {left[0]} is not packed, but the format wants all linears but the head; use compressed_tensors")
    grid = grids.pop()
    for name, layer in layers.items():
        if reason := _refusal(grid, layer):
            raise UserError(f"gptq: {name}: {reason}")
    return {
        "quant_method": "gptq",
        "bits": grid.bits,
        "group_size": grid.group_size or -1,
        "sym": grid.symmetric,
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
        "checkpoint_format": "gptq" if grid.symmetric else "gptq_v2",
    }


def _refusal(grid: Grid, layer: PackedLinear) -> str:
    """Why the format cannot hold a layer; empty if it can."""
    if grid.element != "int" or grid.real_zero or grid.activations:
        return f"{grid.name} is no plain integer format; use compressed_tensors"
    if grid.bits not in WIDTHS:
        return f"the format knows no codes of {grid.bits} bits; allowed: {', '.join(map(str, WIDTHS))}"
    for what, count in (("input", layer.in_features), ("output", layer.out_features)):
        if count % WORD:
            return f"its {count} {what} channels are no multiple of {WORD}, and the format has no padding"
    return ""
