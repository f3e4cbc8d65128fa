"""NNCF, which compresses weights in graphs of OpenVINO, and OpenVINO, which computes with them."""

import logging
import time
from pathlib import Path
from typing import Any

import torch

from qlib.errors import UserError
from qlib.quantize.tool import Options
from qlib.tools.about import About, Kind
from qlib.tools.adapter import Quantized, load_model
from qlib.tools.openvino_graph import convert, linears, stored
from qlib.tools.openvino_runtime import EXACT, OpenVinoRuntime
from qlib.tools.runtime import Runtime
from qlib.tools.witness import hash_rows

__all__ = ["ABOUT", "open_runtime", "quantize"]

AWQ, GPTQ = "AWQ, scales estimated", "GPTQ"
ABOUT = About(
    package="nncf",
    idea="Intel's pair: OpenVINO turns a model into a graph that a C++ runtime compiles for the processor at hand, and"
    " NNCF replaces the weights in that graph by codes, scales and zeros. By rounding alone it needs no data. "
    "With data, AWQ first shifts strong input channels of the down projection into its weights, and an estimation"
    " of scales then fits each group's scale to the layer's outputs; GPTQ may take their place. Codes are "
    "decompressed inside the matrix product, in registers. By default, and left out where we score, the runtime "
    "computes in bf16 where the processor can, keeps the cache in 8 bits and rounds activations to 8 bits before "
    "products with compressed weights.",
    runtime="OpenVINO's C++ kernels (oneDNN), made for the processor when the graph is compiled; none for codes of 3 "
    "bits, which become a dense weight again",
    loads=("OpenVINO", "OpenVINO GenAI", "optimum-intel"),
    by_hand="trace the model with its cache as inputs, make these a state with an empty beginning, and keep it from "
    "sending usage data; all but the last is what optimum-intel does for its users",
    documentation="https://docs.openvino.ai/nightly/openvino-workflow/model-optimization-guide/weight-compression/"
    "4-bit-weight-quantization.html",
    kinds={
        "int8_asym": Kind(8, None, False, "RTN"),
        "int8_sym": Kind(8, None, True, "RTN"),
        "int4_asym": Kind(4, 128, False, "RTN"),
        "int4_sym": Kind(4, 128, True, "RTN"),
        "nf4": Kind(4, 128, True, "RTN"),
        "int4_asym_awq": Kind(4, 128, False, AWQ, reads_text=True),
        "int4_asym_gptq": Kind(4, 128, False, GPTQ, reads_text=True),
        "int3_sym": Kind(3, 128, True, "RTN"),
        "int3_sym_awq": Kind(3, 128, True, AWQ, reads_text=True),
        "int3_sym_gptq": Kind(3, 128, True, GPTQ, reads_text=True),
        "int2_sym": Kind(2, 128, True, "RTN"),
        "int2_sym_awq": Kind(2, 128, True, AWQ, reads_text=True),
        "int2_sym_gptq": Kind(2, 128, True, GPTQ, reads_text=True),
    },
    beside=("openvino",),
)

METHODS = {"RTN": {}, AWQ: {"awq": True, "scale_estimation": True}, GPTQ: {"gptq": True}}


def quantize(folder: Path, ids: torch.Tensor, options: Options) -> Quantized:
    """See `qlib.tools.adapter`. Values are read from the graph's constants."""
    graph, seen = convert(load_model(folder)), []
    asked = METHODS[options.method]
    begun = time.perf_counter()
    _compress(graph, options, asked, _rows(ids, seen) if asked else {})
    seconds = time.perf_counter() - begun
    weights, size = stored(graph)
    if options.bits == 3:  # without a kernel for them, the whole weight is decompressed when compiling, in fp16
        weights = {name: weight.half().float() for name, weight in weights.items()}
    bits = 8 * size / sum(weight.numel() for weight in weights.values())
    used = {"mode": _mode(options), "group_size": options.group_size or -1, "ratio": 1.0} | asked
    used |= _defaults(asked) | {"weights before": "bf16", "activations when scored": "fp32"}
    used["activations by default"] = OpenVinoRuntime(graph, {}).settings
    return Quantized(weights, seconds, bits, used, seen=hash_rows(torch.cat(seen)) if asked else None)


def open_runtime(folder: Path, options: Options | None) -> Runtime:
    """See `qlib.tools.runtime`. Uncompressed in fp32; compressed, with its own defaults for this processor."""
    graph = convert(load_model(folder))
    if options is None:
        return OpenVinoRuntime(graph, EXACT)
    _compress(graph, options, {}, {})
    return OpenVinoRuntime(graph, {})


def _mode(options: Options) -> str:
    """Its name of the format, without how codes are chosen."""
    return options.kind.removesuffix("_awq").removesuffix("_gptq")


def _compress(graph: Any, options: Options, asked: dict[str, bool], data: dict[str, Any]) -> None:
    """Compress all linears of the blocks and nothing else, in place.

    Raises:
        UserError: it left one as it was.
    """
    import nncf

    nncf.set_log_level(logging.WARNING)  # else it draws tables
    names = list(linears(graph, outside=True))
    nncf.compress_weights(
        graph,
        mode=nncf.CompressWeightsMode(_mode(options)),
        ratio=1.0,
        group_size=options.group_size or -1,
        ignored_scope=nncf.IgnoredScope(names=names),
        **asked,
        **data,
    )
    for name, node in linears(graph).items():
        if node.input_value(1).get_node().get_type_name() == "Constant":
            raise UserError(f"nncf: {name} was left uncompressed")


def _rows(ids: torch.Tensor, seen: list[torch.Tensor]) -> dict[str, Any]:
    """A data set of the rows of `ids`; those that are asked for are noted in `seen`."""
    import nncf
    import numpy as np

    def feed(row: torch.Tensor) -> list[np.ndarray]:
        seen.append(row[None])
        return [row[None].numpy(), np.array([len(row) - 1]), np.zeros(1, np.int32)]

    return {"dataset": nncf.Dataset(list(ids), feed), "subset_size": len(ids)}


def _defaults(asked: dict[str, bool]) -> dict[str, Any]:
    """What it has by default and decides the result."""
    from nncf.quantization.advanced_parameters import AdvancedCompressionParameters

    advanced = AdvancedCompressionParameters()
    parts = {"awq": advanced.awq_params, "scale_estimation": advanced.scale_estimation_params}
    parts |= {"gptq": advanced.gptq_params}
    return {f"{name} by default": vars(part) for name, part in parts.items() if name in asked}
