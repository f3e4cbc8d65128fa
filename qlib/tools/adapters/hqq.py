"""hqq: half-quadratic quantization by its authors, without any text."""

import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlib.errors import UserError
from qlib.quantize.tool import Options
from qlib.tools.about import About
from qlib.tools.adapter import Quantized, load_model
from qlib.tools.runtime import ModuleRuntime

__all__ = ["ABOUT", "open_runtime", "quantize"]

ABOUT = About(
    package="hqq",
    idea="Half-quadratic quantization reads no text: for each group of weights it moves the zero until most of them "
    "are hit well, and lets a few be hit badly, since a norm below one asks little of outliers. The two halves "
    "of each step have a closed form, so a large model takes minutes. The zero is a real number, except in 4 "
    "bits, where it starts from a whole one.",
    method="HQQ",
    runtime="its HQQLinear in torch, which dequantizes the whole weight for every call",
    loads=("transformers", "vLLM"),
    by_hand="put its layers into the model one by one, on the device cpu; its fast kernels (gemlite, torchao_int4) need"
    " CUDA",
    documentation="https://github.com/mobiusml/hqq#basic-usage",
    reads_text=False,
)

AXIS = 1  # groups along the input channels, as its documentation recommends; what its kernels need
STORED = torch.float16  # of scales and zeros, its default


def quantize(folder: Path, ids: torch.Tensor, options: Options) -> Quantized:
    """See `qlib.tools.adapter`. Packing is part of the time: its layers are born packed."""
    config = _config(options)
    weights, seconds, stored = {}, 0.0, 0
    for name, linear in _linears(load_model(folder), options):
        begun = time.perf_counter()
        layer = _layer(linear, config, STORED)
        seconds += time.perf_counter() - begun
        weights[name] = _values(layer)
        stored += 8 * sum(part.nbytes for part in (layer.W_q, layer.meta["scale"], layer.meta["zero"]))
    used = {name: value for name, value in config["weight_quant_params"].items() if name != "nbits"}
    used |= {"compute_dtype": str(STORED), "packing": layer.meta["packing"]}
    return Quantized(weights, seconds, stored / sum(weight.numel() for weight in weights.values()), used)


def open_runtime(folder: Path, options: Options | None) -> ModuleRuntime:
    """See `qlib.tools.adapter`. Uncompressed in fp32; else in bf16, with zeros where min and max put them."""
    model = load_model(folder)
    if options is None:
        return ModuleRuntime(model.float())
    config = _config(options)
    config["weight_quant_params"]["optimize"] = False
    model = model.bfloat16()
    for name, linear in _linears(model, options):
        model.set_submodule(name, _layer(linear, config, torch.bfloat16))
    return ModuleRuntime(model)


def _config(options: Options) -> dict[str, Any]:
    from hqq.core.quantize import BaseQuantizeConfig

    if options.symmetric:
        raise UserError("symmetric: hqq always fits a zero per group")
    return BaseQuantizeConfig(nbits=options.bits, group_size=options.group_size, axis=AXIS)


def _linears(model: nn.Module, options: Options) -> list[tuple[str, nn.Linear]]:
    """Linears of the blocks, by name. Its groups would go on from one row to the next where they do not fit."""
    found = [(name, part) for name, part in model.model.layers.named_modules(prefix="model.layers")]
    found = [(name, part) for name, part in found if isinstance(part, nn.Linear)]
    for name, linear in found:
        if options.group_size and linear.in_features % options.group_size:
            raise UserError(f"group_size: {options.group_size} does not divide {name}'s {linear.in_features} inputs")
    return found


def _layer(linear: nn.Linear, config: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    """Its layer in the place of a linear, which loses its weight."""
    from hqq.core.quantize import HQQLinear

    return HQQLinear(linear, config, compute_dtype=dtype, device="cpu")


def _values(layer: nn.Module) -> torch.Tensor:
    """Its own dequantization, in fp32, of what is stored."""
    from hqq.core.quantize import Quantizer

    exact = {name: layer.meta[name].float() for name in ("scale", "zero")}
    return Quantizer.dequantize(layer.W_q, layer.meta | exact | {"compute_dtype": torch.float32}).contiguous()
