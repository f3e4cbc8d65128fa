"""optimum-quanto: rounding to the nearest code, as tensors that know how to multiply."""

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable

import torch
from torch import nn

from qlib.quantize.tool import Options
from qlib.tools.about import About, Kind
from qlib.tools.adapter import Quantized, load_model
from qlib.tools.runtime import ModuleRuntime

__all__ = ["ABOUT", "open_runtime", "quantize"]

ABOUT = About(
    package="optimum",
    idea="Plain rounding as a type of tensor: a linear's weight becomes a tensor of codes that multiplies by itself,"
    " so any torch model runs compressed, and can even be trained on. Eight bits have one scale per output "
    "channel, four and two a scale and a real offset for each group of 128. It reads no text unless activations"
    " are rounded, too.",
    runtime="torch's own kernels for int8 and int4 weights with bf16; two bits are unpacked for every call",
    loads=("transformers", "diffusers"),
    by_hand="a C++ compiler, and ninja on the path: it builds the unpacking of two bits when that first runs",
    documentation="https://github.com/huggingface/optimum-quanto#llm-models",
    kinds={
        "qint8": Kind(8, None, True, "RTN"),
        "qint4": Kind(4, 128, False, "RTN"),
        "qint2": Kind(2, 128, False, "RTN"),
    },
)


def quantize(folder: Path, ids: torch.Tensor, options: Options) -> Quantized:
    """See `qlib.tools.adapter`. It computes in the model's own dtype, bf16; packing is part of the time."""
    model = load_model(folder)
    seconds = _compress(model, options)
    layers = {name: layer for name, layer in model.named_modules() if _is_compressed(layer)}
    weights = {name: _values(layer.weight.data) for name, layer in layers.items()}
    stored = 8 * sum(_bytes(layer.weight.data) for layer in layers.values())
    used = {"weights": options.kind, "activations": None, "exclude": "lm_head", "dtype": str(model.dtype)}
    used |= {"optimizer": type(next(iter(layers.values())).optimizer).__name__}
    used |= {"kept as": sorted({type(layer.weight.data).__name__ for layer in layers.values()})}
    return Quantized(weights, seconds, stored / sum(weight.numel() for weight in weights.values()), used)


def open_runtime(folder: Path, options: Options | None) -> ModuleRuntime:
    """See `qlib.tools.adapter`. Uncompressed in fp32; else in bf16, for which torch has the kernels."""
    from optimum.quanto import WeightQBitsTensor

    model = load_model(folder)
    if options is None:
        return ModuleRuntime(model.float())
    model = model.bfloat16()
    _compress(model, options)
    if any(type(layer.weight.data) is WeightQBitsTensor for layer in model.modules() if _is_compressed(layer)):
        _build_unpacking()
    model.forward = _outside_of_inference_mode(model.forward)
    return ModuleRuntime(model)


def _compress(model: nn.Module, options: Options) -> float:
    """Compress the linears of the blocks in place. Returns the seconds it took."""
    from optimum.quanto import freeze
    from optimum.quanto import quantize as into_type

    begun = time.perf_counter()
    into_type(model, weights=options.kind, exclude="lm_head")
    freeze(model)
    return time.perf_counter() - begun


def _is_compressed(layer: nn.Module) -> bool:
    from optimum.quanto import QTensor

    return isinstance(getattr(layer, "weight", None), QTensor)


def _values(weight: torch.Tensor) -> torch.Tensor:
    """What a compressed weight `[out, in]` stands for where it is multiplied, in fp32.

    Its own dequantization rounds to bf16, and recomputes the offset that torch's kernel for int4 has in another form.
    """
    from optimum.quanto import WeightQBytesTensor
    from optimum.quanto.tensor.weights.tinygemm import TinyGemmWeightQBitsTensor

    if isinstance(weight, WeightQBytesTensor):
        return weight._scale.float() * weight._data
    if isinstance(weight, TinyGemmWeightQBitsTensor):  # around the middle code: scale and offset [groups, out, 2]
        scale, middle = weight._scale_shift.float().permute(2, 1, 0)[..., None]
        codes = weight._data.unpack().float().unflatten(1, (scale.shape[1], -1))  # [out, groups, group]
        return ((codes - 8) * scale + middle).flatten(1).contiguous()
    packed, bits = weight._data._data, weight._qtype.bits  # its own unpacking would have to be compiled first
    codes = torch.cat([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)])[: len(weight._scale)]
    return (weight._scale.float() * codes - weight._shift.float()).reshape(weight.shape)


def _bytes(tensor: torch.Tensor) -> int:
    """Of all plain tensors that a compressed one is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])


def _outside_of_inference_mode(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Its two-bit tensors cannot be transposed there; without gradients is all that they need."""

    def wrapped(*arguments: Any, **named: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            return forward(*arguments, **named)

    return wrapped


def _build_unpacking() -> None:
    """Compile its unpacking (a minute) in a temporary folder; it would do so among its sources, when first called."""
    from optimum.quanto.library.extensions.extension import get_extension

    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # where ninja is
    with tempfile.TemporaryDirectory() as place:
        extension = get_extension("quanto_cpp")
        extension.build_directory = place
        extension.lib  # stays loaded when its file is gone
