"""Intel Neural Compressor: weight-only methods behind one interface."""

import tempfile
import time
from contextlib import chdir
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlib.errors import UserError
from qlib.quantize.tool import Options
from qlib.tools.about import ANY, About, Kind
from qlib.tools.adapter import Quantized, load_model
from qlib.tools.packed import block_linears, fill, replace
from qlib.tools.runtime import ModuleRuntime, Runtime
from qlib.tools.witness import Witness

__all__ = ["ABOUT", "open_runtime", "quantize"]

ABOUT = About(
    package="neural_compressor",
    idea="Intel's toolbox: a model is prepared, shown text, and converted, and one configuration object says by which "
    "of several published methods. Rounding to nearest and HQQ look at weights alone; GPTQ and AWQ at the inputs of "
    "each linear. What comes out keeps its codes packed on disk, but a CPU computes with the dense fp32 weights that "
    "they are turned back into.",
    runtime="torch, with weights turned back into fp32 at the first call (HQQ: into fp16 at every call)",
    by_hand="for AWQ and TEQ one example of the input; TEQ's training loop is left to the user, and beside 4 bits its "
    "conversion packs wrong codes, so it is not among the kinds here",
    documentation="https://intel.github.io/neural-compressor/latest/docs/source/PT_WeightOnlyQuant.html",
    kinds={
        "rtn": Kind(ANY, ANY, ANY, "RTN"),
        "gptq": Kind(ANY, ANY, ANY, "GPTQ", reads_text=True),
        "awq": Kind(ANY, ANY, ANY, "AWQ", reads_text=True),
        "hqq": Kind(ANY, ANY, False, "HQQ"),
    },
)

CONFIGS = {"rtn": "RTNConfig", "gptq": "GPTQConfig", "awq": "AWQConfig", "hqq": "HQQConfig"}
READS = ("gptq", "awq")
#: Defaults that decide the result, of whichever configuration has them.
DECIDE = ("percdamp", "block_size", "act_order", "static_groups", "true_sequential", "use_mse_search", "use_full_range")
DECIDE += ("use_auto_scale", "use_auto_clip", "folding", "quant_zero", "quant_scale")


def quantize(folder: Path, ids: torch.Tensor, options: Options) -> Quantized:
    """See `qlib.tools.adapter`. It starts from fp32, as its examples for a CPU do, and packs while it converts."""
    import neural_compressor.torch.quantization as tool

    asked = {"bits": options.bits, "group_size": options.group_size or -1}
    asked |= {} if options.kind == "hqq" else {"use_sym": options.symmetric}
    if options.kind == "hqq" and options.group_size is None:
        raise UserError("group_size: its HQQ needs groups, which go across output channels")
    config = getattr(tool, CONFIGS[options.kind])(**asked)
    model = load_model(folder).float()
    names = list(block_linears(model))
    with tempfile.TemporaryDirectory() as elsewhere, chdir(elsewhere):  # it writes logs where it stands
        witness = Witness(model)
        begun = time.perf_counter()
        model = tool.prepare(model, config, **({"example_inputs": ids[:1]} if options.kind == "awq" else {}))
        if options.kind in READS:
            for row in ids:
                model(row[None])
        model = tool.convert(model)
        seconds = time.perf_counter() - begun
    layers = {name: model.get_submodule(name) for name in names}
    size = 8 * sum(_stored_bytes(layer) for layer in layers.values())
    weights = {name: _weight(layer) for name, layer in layers.items()}
    used = {name: getattr(config, name) for name in DECIDE if hasattr(config, name)} | {"kind": options.kind}
    if options.kind == "awq":
        used["bits of its search for scales and clips"] = 4  # it passes them under a name that is not looked at
    return Quantized(weights, seconds, size / sum(w.numel() for w in weights.values()), used, seen=witness.close())


def _weight(layer: nn.Module) -> torch.Tensor:
    """What a layer multiplies its input with, in fp32: its own dequantization, which goes on in fp16."""
    if hasattr(layer, "input_scale"):  # AWQ: inputs are scaled before the linear
        return _weight(layer.linear) * layer.input_scale.float()
    return (layer.recover() if hasattr(layer, "recover") else layer.dequantize_weight()).detach().float()


def _stored_bytes(layer: Any) -> int:
    """Of codes, scales, zeros and scales of inputs. To be asked before HQQ's zeros are turned back for good."""
    if hasattr(layer, "input_scale"):
        return layer.input_scale.nbytes + _stored_bytes(layer.linear)
    if hasattr(layer, "qweight"):
        return sum(getattr(layer, name).nbytes for name in ("qweight", "qzeros", "scales"))
    parts = (layer.q_weight.val, layer.q_weight.scale, layer.q_weight.zero) if hasattr(layer, "q_weight") else None
    if parts is None:  # a quantized tensor inside of another
        parts = (layer.val, layer.scale, layer.zero)
    return sum(part.nbytes if isinstance(part, torch.Tensor) else _stored_bytes(part) for part in parts)


def open_runtime(folder: Path, options: Options | None) -> Runtime:
    """See `qlib.tools.adapter`. In fp32, which its linears compute in; HQQ: in fp16, which it turns the model into."""
    model = load_model(folder)
    if options is None:
        return ModuleRuntime(model.float())
    model = model.half() if options.kind == "hqq" else model.float()
    for name, linear in block_linears(model).items():
        replace(model, name, _hqq(linear, options) if options.kind == "hqq" else _packed(linear, options))
    return ModuleRuntime(model)


def _packed(linear: nn.Linear, options: Options) -> nn.Module:
    """Its linear for all methods but HQQ, with any codes."""
    from neural_compressor.torch.algorithms.weight_only.modules import INCWeightOnlyLinear

    shape = {"in_features": linear.in_features, "out_features": linear.out_features, "bias": linear.bias is not None}
    layer = INCWeightOnlyLinear(**shape, bits=options.bits, group_size=options.group_size or -1, zp=True)
    fill(layer, options.bits)
    return layer


def _hqq(linear: nn.Linear, options: Options) -> nn.Module:
    """Its HQQ without the optimisation, which takes minutes for a large matrix."""
    from neural_compressor.torch.algorithms.weight_only.hqq.config import HQQModuleConfig, QTensorConfig
    from neural_compressor.torch.algorithms.weight_only.hqq.core import HQQLinear

    numbers = QTensorConfig(options.bits, group_size=options.group_size, optimize=False, round_zero=options.bits == 4)
    zeros = QTensorConfig(8, channel_wise=False, group_size=None, optimize=False)
    with torch.no_grad():
        return HQQLinear.from_float(linear, HQQModuleConfig(numbers, None, zeros))
