"""torchao: tensors that hold codes in the place of a linear's weight, from the makers of PyTorch."""

import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlib.errors import UserError
from qlib.quantize.tool import Options
from qlib.tools.about import ANY, About, Kind
from qlib.tools.adapter import Quantized, load_model
from qlib.tools.runtime import ModuleRuntime, Runtime
from qlib.tools.torchao_tensors import computing_in_fp32, is_packed, stored_bits, values

__all__ = ["ABOUT", "open_runtime", "quantize"]

ABOUT = About(
    package="torchao",
    idea="Quantization as a kind of tensor: one call replaces the weight of every linear by a tensor subclass that "
    "holds codes and scales and says itself how a matrix product is done with it, so that the model's code stays as it "
    "is and torch.compile can fuse what it does. The codes are rounded to nearest; HQQ, where it is chosen, moves scale "
    "(and zero) until what is left is sparse, by looking at the weights alone. No text is read.",
    runtime="its tensors in transformers' model in bf16: int4 in PyTorch's own CPU kernel, what torch.compile makes of "
    "the others; linears are compiled for steps of one token, as transformers' generate does, where a C++ compiler is",
    loads=("transformers", "vLLM", "ExecuTorch"),
    by_hand="for 4 bits on a CPU take the configuration of its prototypes, as that of its documentation is for GPUs; "
    "its own C++ kernels for 1 to 8 bits and for int8 activations with int4 weights are not in the package for x86",
    documentation="https://docs.pytorch.org/ao/stable/workflows/inference.html",
    kinds={
        "int8": Kind(8, None, True, "RTN"),
        "int8-dynamic": Kind(8, None, True, "RTN", activations=8),
        "int4": Kind(4, ANY, False, "RTN"),
        "int4-hqq": Kind(4, ANY, False, "HQQ"),
        "intx": Kind(ANY, ANY, ANY, "RTN"),
        "intx-hqq": Kind(ANY, ANY, True, "HQQ, scales only"),
    },
)


def quantize(folder: Path, ids: torch.Tensor, options: Options) -> Quantized:
    """See `qlib.tools.adapter`. No text is read; the scales are computed from the weights in the checkpoint's dtype.

    Raises:
        UserError: the groups do not fit a linear, which the tool would leave as it is without a word.
    """
    from torchao.quantization import quantize_
    from torchao.quantization.utils import recommended_inductor_config_setter

    model, config = load_model(folder), _config(options)
    for name, layer in model.model.layers.named_modules():
        if isinstance(layer, nn.Linear) and not _fits(layer, options):
            columns = layer.in_features
            raise UserError(f"group_size: {options.group_size} does not divide the {columns} inputs of {name}")
    recommended_inductor_config_setter()  # it would do so while it quantizes, and what that imports takes its time
    begun = time.perf_counter()
    quantize_(model.model.layers, config)
    seconds = time.perf_counter() - begun
    linears = {name: layer for name, layer in model.named_modules() if is_packed(layer)}
    stored = sum(stored_bits(layer.weight) for layer in linears.values())
    size = stored / sum(layer.weight.numel() for layer in linears.values())
    used = {"config": _told(config), "codes": "packed" if options.kind in ("int4", "int4-hqq") else "one in each byte"}
    if ABOUT.kinds[options.kind].activations is None:
        weights = {name: values(layer.weight) for name, layer in linears.items()}
        return Quantized(weights, seconds, size, used)
    used |= {"activations": "rounded to int8 by tokens when it runs; all else in fp32"}
    return Quantized({}, seconds, size, used, runtime=ModuleRuntime(computing_in_fp32(model)))


def open_runtime(folder: Path, options: Options | None) -> Runtime:
    """See `qlib.tools.adapter`. Round to nearest in the place of HQQ, which ends in the same format.

    Linears that the groups do not fit stay as they are.
    """
    from torchao.quantization import quantize_

    model = load_model(folder)
    if options is None:
        return ModuleRuntime(model.float())
    chosen = {layer for layer in model.modules() if isinstance(layer, nn.Linear) and _fits(layer, options)}
    quantize_(model.bfloat16().model.layers, _config(options, plain=True), lambda layer, name: layer in chosen)
    return _Stepping(model) if shutil.which(os.environ.get("CXX", "g++")) else ModuleRuntime(model)


class _Stepping(ModuleRuntime):
    """Linears are compiled for steps of one token; a prompt goes uncompiled, which suits many rows better."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        torch._dynamo.config.recompile_limit = 64  # shapes of linears, of more than one model in a process
        with torch.inference_mode():
            for layer in filter(is_packed, model.modules()):
                layer.compile(dynamic=False)
                layer(torch.zeros(1, 1, layer.in_features, dtype=torch.bfloat16))

    def __call__(self, ids: torch.Tensor, keep: int) -> torch.Tensor:
        with torch.compiler.set_stance("force_eager"):
            return super().__call__(ids, keep)

    def prefill(self, ids: torch.Tensor) -> None:
        with torch.compiler.set_stance("force_eager"):
            super().prefill(ids)


def _config(options: Options, plain: bool = False) -> Any:
    """The tool's configuration. `plain`: without HQQ.

    Raises:
        UserError: int4 without groups.
    """
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig
    from torchao.quantization import PerAxis, PerGroup
    from torchao.quantization.quant_primitives import MappingType
    from torchao.quantization.quantize_.workflows import Int4ChooseQParamsAlgorithm, IntxChooseQParamsAlgorithm

    kind, size = options.kind, options.group_size
    hqq = kind.endswith("-hqq") and not plain
    if kind.startswith("int4") and size is None:
        raise UserError("group_size: null is not supported by torchao's int4; allowed: 32, 64, 128")
    if kind.startswith("int4"):
        algorithm = Int4ChooseQParamsAlgorithm.HQQ if hqq else Int4ChooseQParamsAlgorithm.TINYGEMM
        return PrototypeInt4WeightOnlyConfig(group_size=size, int4_choose_qparams_algorithm=algorithm)
    if kind.startswith("intx"):
        return IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{options.bits}"),
            granularity=PerGroup(size) if size else PerAxis(0),
            mapping_type=MappingType.SYMMETRIC if options.symmetric else MappingType.ASYMMETRIC,
            intx_choose_qparams_algorithm=getattr(IntxChooseQParamsAlgorithm, "HQQ_SCALE_ONLY" if hqq else "AFFINE"),
        )
    return {"int8": Int8WeightOnlyConfig, "int8-dynamic": Int8DynamicActivationInt8WeightConfig}[kind]()


def _fits(layer: nn.Linear, options: Options) -> bool:
    return layer.in_features % (options.group_size or 1) == 0


def _told(config: Any) -> dict[str, str]:
    """The class of a configuration and all of its settings, its defaults among them."""
    return {"class": type(config).__name__} | {name: str(value) for name, value in vars(config).items()}
