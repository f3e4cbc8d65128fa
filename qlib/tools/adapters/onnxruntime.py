"""ONNX Runtime: linears in blocks of 2, 4 or 8 bits (its operator MatMulNBits), or 8-bit weights and activations."""

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from qlib.errors import UserError
from qlib.quantize.tool import Options
from qlib.tools.about import ANY, About, Kind
from qlib.tools.adapter import Quantized, load_model
from qlib.tools.runtime import Runtime
from qlib.tools.witness import hash_rows

__all__ = ["ABOUT", "open_runtime", "quantize"]

ABOUT = About(
    package="onnxruntime",
    idea="A model becomes a graph of standard operators in a file, which one C++ library runs on almost any device. "
    "Quantization rewrites the graph: a product with a constant matrix becomes one operator, MatMulNBits, whose weight lies "
    "in blocks of 2, 4 or 8 bits, each with a scale in the graph's own type: fp32 on a CPU, so small blocks cost more bits "
    "than elsewhere. Its plain rounding never searches; beside it stand a weighted search of each block's range (from "
    "llama.cpp's K-quants), HQQ, which fits fractional zeros without data, and a GPTQ on inputs of the uncompressed model, "
    "which in version 1.32 takes its updates from the empty half of a triangular matrix: nothing of the text reaches a weight. "
    "Its older dynamic quantization rounds activations to 8 bits when it runs, all tokens of a call with one scale. "
    "Asked for accuracy level 4, MatMulNBits rounds activations to 8 bits in blocks as well.",
    runtime="its CPU kernels (MLAS) for MatMulNBits and grouped attention; activations in fp32, in 8 bits inside of products",
    loads=("onnxruntime-genai", "transformers.js", "optimum"),
    by_hand="write the graph: its quantizers start from ONNX, and its exporters for language models are packages of their own",
    documentation="https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html",
    kinds={
        "rtn": Kind(ANY, ANY, ANY, "RTN"),
        "k_quant": Kind(4, ANY, False, "RTN, ranges searched with weighted errors"),
        "hqq": Kind(ANY, ANY, False, "HQQ"),
        "gptq": Kind(4, ANY, ANY, "GPTQ without its updates", reads_text=True),
        "dynamic": Kind(8, None, True, "RTN, one scale per matrix", 8),
        "dynamic-channel": Kind(8, None, True, "RTN", 8),
    },
    beside=("onnx",),
)

ACCURACY = 4  # the level its documentation recommends on a CPU: activations in 8 bits inside of products


def quantize(folder: Path, ids: torch.Tensor, options: Options) -> Quantized:
    """See `qlib.tools.adapter`. Only GPTQ reads ids; only dynamic quantization is scored through the runtime.

    The values are those of products in fp32 (accuracy level 0): what level 4 rounds besides is left out, as for all tools.
    """
    from qlib.tools import onnx_graph, onnx_pack
    from qlib.tools.onnx_session import OnnxRuntime, feeds

    _check(options)
    model, runtime, seen = load_model(folder).requires_grad_(False), None, None
    with tempfile.TemporaryDirectory() as place:
        if options.kind == "gptq":
            path, config = onnx_graph.build(model, Path(place)), model.config
            rows = [feeds(config, row[None], 1) for row in ids]
            seen = hash_rows(torch.cat([torch.from_numpy(row["ids"]) for row in rows]))
            begun = time.perf_counter()
            graph = onnx_pack.gptq(path, rows, options, ACCURACY)
            seconds = time.perf_counter() - begun
            weights, stored = onnx_pack.values(graph)
        else:
            packer = onnx_pack.Packer(options, ACCURACY, keep=True)
            path = onnx_graph.build(model, Path(place), packer)
            runtime = OnnxRuntime(path, model.config)  # which refuses what its kernels do not have
            weights, stored, seconds = packer.weights, packer.bytes, packer.seconds
    linears = (m.weight for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head")
    size = 8 * stored / sum(weight.numel() for weight in linears)
    return Quantized(weights, seconds, size, _settings(options), seen=seen, runtime=None if weights else runtime)


def open_runtime(folder: Path, options: Options | None) -> Runtime:
    """See `qlib.tools.adapter`. Codes are rounded plainly, whatever the kind, and stored as the kind stores them."""
    from qlib.tools import onnx_graph, onnx_pack
    from qlib.tools.onnx_session import OnnxRuntime

    if options:
        _check(options)
    packer = onnx_pack.Packer(options, ACCURACY, quick=True) if options else None
    model = load_model(folder).requires_grad_(False)
    with tempfile.TemporaryDirectory() as place:  # the session keeps what it has mapped
        path, config = onnx_graph.build(model, Path(place), packer), model.config
        del model
        return OnnxRuntime(path, config)


def _check(options: Options) -> None:
    if options.group_size is None and not options.kind.startswith("dynamic"):
        raise UserError("group_size: onnxruntime has no MatMulNBits with one scale per output channel; name 32, 64 or 128")


def _settings(options: Options) -> dict[str, Any]:
    """What was told, and the defaults that decide the result."""
    told = {"kind": options.kind, "embedding and head": "fp32", "scales": "fp32"}
    if options.kind.startswith("dynamic"):
        return told | {"weight_type": "QInt8", "activations": "QUInt8", "reduce_range": False}
    told |= {"quant_format": "QOperator", "accuracy_level": ACCURACY}
    if options.kind == "hqq":
        told |= {"accuracy_level": None, "lp_norm": 0.7, "beta": 10, "kappa": 1.01, "iters": 20, "zeros": "fp32"}
    if options.kind == "gptq":
        told |= {"percdamp": 0.01, "block_size": 128, "actorder": False, "mse": False, "perchannel": True}
    return told
