"""Checkpoints of the compressed-tensors library, which transformers and vLLM load: every format of the table.

Integers are shifted to be signed and packed as unsigned, which gives back the codes as they are.
"""

import re
from typing import Any, Mapping, Sequence

import torch

from qlib.errors import UserError
from qlib.export.words import pack_words
from qlib.layers import PackedLinear
from qlib.layers.storage import pack_bits
from qlib.quantize.formats import Grid
from qlib.quantize.grid import CompressedWeight

__all__ = ["layer_tensors", "quantization_config"]


def layer_tensors(compressed: CompressedWeight) -> dict[str, torch.Tensor]:
    """What the checkpoint holds in the place of a linear's weight `[out, in]`.

    Returns:
        integers: weight_packed int32 `[out, in * bits / 32]`, weight_scale bf16 `[out, groups]`, weight_shape, and where
        there are zeros weight_zero_point int32 `[out * bits / 32, groups]`; with int8 activations weight int8 instead.
        fp8: weight float8_e4m3fn, weight_scale. fp4: weight_packed uint8 `[out, in / 2]`, weight_scale in its own
        type (e8m0 as uint8), and for nvfp4 weight_global_scale, by which scales are divided.
    """
    grid, codes, scales = compressed.grid, compressed.codes, compressed.scales.contiguous()
    if grid.element == "fp8":
        return {"weight": codes.view(torch.float8_e4m3fn), "weight_scale": scales[:1, 0].clone() if _of_tensor(grid) else scales}
    if grid.element != "int":
        tensors = {"weight_packed": pack_bits(codes, 4)}
        if grid.element == "mxfp4":
            return tensors | {"weight_scale": scales.view(torch.uint8)}
        return tensors | {"weight_scale": scales, "weight_global_scale": (1 / compressed.tensor_scale).reshape(1)}
    if grid.activations:
        return {"weight": (codes ^ (grid.levels // 2)).view(torch.int8), "weight_scale": scales}
    tensors = {
        "weight_packed": pack_words(codes, grid.bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor(codes.shape),
    }
    if grid.has_zeros:
        tensors["weight_zero_point"] = pack_words(compressed.zeros.t(), grid.bits).t().contiguous()
    return tensors


def quantization_config(layers: Mapping[str, PackedLinear], others: Sequence[str]) -> dict[str, Any]:
    """The entry of config.json: one group for all linears, or one for each format, which then names its layers.

    Args:
        others: names of linears that stay as they are.

    Raises:
        UserError: zeros that are no codes, which the library does not know.
    """
    members: dict[Grid, list[str]] = {}
    for name, layer in layers.items():
        if layer.grid.real_zero:
            raise UserError(f"compressed_tensors: {name}: zeros of {layer.grid.name} are no codes; round them (zeros: code)")
        members.setdefault(layer.grid, []).append(name)
    targets = {grid: ["Linear"] if len(members) == 1 else _exactly(names) for grid, names in members.items()}
    groups = {f"group_{index}": _group(grid, targets[grid]) for index, grid in enumerate(members)}
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": groups,
        "ignore": list(others),
        "kv_cache_scheme": None,
    }


def _group(grid: Grid, targets: list[str]) -> dict[str, Any]:
    weights = {
        "num_bits": grid.bits,
        "type": "int" if grid.element == "int" else "float",
        "symmetric": grid.symmetric,
        "strategy": _strategy(grid),
        "group_size": grid.group_size if isinstance(grid.group_size, int) else None,
        "dynamic": False,
    }
    type = "int" if grid.activations == "int8" else "float"
    token = {"num_bits": 8, "type": type, "symmetric": True, "strategy": "token", "dynamic": True}
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": token if grid.activations else None,
        "output_activations": None,
        "format": _format(grid),
    }


def _exactly(names: list[str]) -> list[str]:
    """Names as expressions: the library matches a plain name with classes of modules too."""
    return [f"re:^{re.escape(name)}$" for name in names]


def _of_tensor(grid: Grid) -> bool:
    return grid.group_size == "tensor"


def _strategy(grid: Grid) -> str:
    if grid.element == "nvfp4":
        return "tensor_group"
    return "tensor" if _of_tensor(grid) else "group" if grid.group_size else "channel"


def _format(grid: Grid) -> str:
    if grid.element == "int":
        return "int-quantized" if grid.activations else "pack-quantized"
    return {"fp8": "float-quantized", "mxfp4": "mxfp4-pack-quantized", "nvfp4": "nvfp4-pack-quantized"}[grid.element]
