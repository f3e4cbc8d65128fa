"""bitsandbytes: four bits in levels made for normal weights, as QLoRA trains on them, and LLM.int8()."""

import copy
import logging
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlib.quantize.tool import Options
from qlib.tools.about import About, Kind
from qlib.tools.adapter import Quantized, load_model
from qlib.tools.runtime import ModuleRuntime, Runtime

__all__ = ["ABOUT", "open_runtime", "quantize"]

ABOUT = About(
    package="bitsandbytes",
    idea="Compression while a model is loaded, without a look at any text. NF4 has 16 levels that are quantiles of a "
    "normal distribution, as weights are nearly normal; FP4 has those of a float of 4 bits. Blocks of 64 weights share "
    "their largest absolute value, which double quantization stores in 8 bits. LLM.int8() rounds weights by rows and "
    "activations by tokens to 8 bits, and computes apart, unrounded, the few input channels in which some activation "
    "reaches 6. QLoRA trains small matrices beside such weights.",
    runtime="its linears in transformers' model in bf16: 4 bits in its own C++ kernels (fused where the processor has "
    "AVX512-BF16, with weights packed anew and block scales rounded to bf16), int8 as PyTorch's integer product",
    loads=("transformers", "PEFT", "vLLM"),
    by_hand="for int8 silence its logger, which warns at every call that the activations are cast to fp16; its package "
    "`kernels`, which would fetch a faster kernel for 4 bits from the hub, is left out",
    documentation="https://huggingface.co/docs/transformers/quantization/bitsandbytes",
    kinds={
        "nf4": Kind(4, 64, True, "RTN"),
        "nf4-double": Kind(4, 64, True, "RTN"),
        "fp4": Kind(4, 64, True, "RTN"),
        "int8": Kind(8, None, True, "RTN", activations=8),
    },
)

THRESHOLD = 6.0  # of outliers among activations, the default of transformers' BitsAndBytesConfig


def quantize(folder: Path, ids: torch.Tensor, options: Options) -> Quantized:
    """See `qlib.tools.adapter`. No text is read. LLM.int8() is scored in its own kernels in a model in fp32."""
    model, rounds = load_model(folder), ABOUT.kinds[options.kind].activations is not None
    packed, seconds = _replace_linears(model.float() if rounds else model, options)
    stored = sum(_stored_bits(layer) for layer in packed.values())
    size = stored / sum(layer.in_features * layer.out_features for layer in packed.values())
    if rounds:
        used = {"llm_int8_threshold": THRESHOLD, "outliers": "channels with one in any row of a call, computed in fp32"}
        return Quantized({}, seconds, size, used, runtime=ModuleRuntime(model))
    weights = {name: _values(layer.weight) for name, layer in packed.items()}
    state = next(iter(packed.values())).weight.quant_state
    used = {"bnb_4bit_quant_type": state.quant_type, "bnb_4bit_use_double_quant": state.nested}
    used |= {"blocksize": state.blocksize, "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8"}
    used |= {"counted": "codes and block scales; not the levels, which every linear has in its state, too"}
    return Quantized(weights, seconds, size, used)


def open_runtime(folder: Path, options: Options | None) -> Runtime:
    """See `qlib.tools.adapter`."""
    model = load_model(folder)
    if options is None:
        return ModuleRuntime(model.float())
    _replace_linears(model.bfloat16(), options)
    return ModuleRuntime(model)


def _replace_linears(model: nn.Module, options: Options) -> tuple[dict[str, nn.Module], float]:
    """Put its linears into the blocks, in place, one by one. Returns them by name, and the seconds of rounding."""
    import bitsandbytes  # noqa: F401  what it loads is not counted

    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # a line for every call
    packed, seconds = {}, 0.0
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and linear is not model.get_output_embeddings():
            layer, weight = _empty(linear, options)
            begun = time.perf_counter()
            layer.weight = weight.to("cpu")  # it rounds what arrives at a device
            seconds += time.perf_counter() - begun
            layer.bias = linear.bias
            model.set_submodule(name, layer)
            packed[name] = layer
    return packed, seconds


def _empty(linear: nn.Linear, options: Options) -> tuple[nn.Module, nn.Parameter]:
    """Its linear without weights, and the parameter that will hold them, not rounded yet."""
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    sizes = {"input_features": linear.in_features, "output_features": linear.out_features}
    sizes |= {"bias": linear.bias is not None, "device": "meta"}
    weight = linear.weight.detach()
    if options.kind == "int8":
        layer = Linear8bitLt(**sizes, has_fp16_weights=False, threshold=THRESHOLD)
        return layer, Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    told: dict[str, Any] = {"quant_type": options.kind[:3], "compress_statistics": options.kind.endswith("-double")}
    layer = Linear4bit(**sizes, **told, compute_dtype=torch.bfloat16)
    return layer, Params4bit(weight, requires_grad=False, blocksize=options.group_size, module=layer, **told)


def _stored_bits(layer: nn.Module) -> int:
    """Of codes and scales, before any product packs them anew."""
    if hasattr(layer.weight, "SCB"):
        return 8 * (layer.weight.CB.nbytes + layer.weight.SCB.nbytes)
    state = layer.weight.quant_state
    kept = [layer.weight.data, state.absmax]
    if state.nested:
        kept += [state.state2.absmax, state.offset]
    return sum(8 * tensor.nbytes for tensor in kept)


def _values(weight: nn.Parameter) -> torch.Tensor:
    """What the stored codes stand for in fp32, by bitsandbytes itself; its products round them to bf16."""
    from bitsandbytes.functional import dequantize_4bit

    state = copy.copy(weight.quant_state)
    state.dtype = torch.float32
    return dequantize_4bit(weight.data, state)
