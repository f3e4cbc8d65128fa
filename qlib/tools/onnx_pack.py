"""ONNX Runtime's quantizers on the graph of one linear or of a whole model, and what their results stand for."""

import io
import logging
import tempfile
import time
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Iterator

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from onnxruntime.quantization import matmul_nbits_quantizer as nbits
from onnxruntime.quantization import quantize_dynamic

from qlib.quantize.tool import Options

__all__ = ["Packer", "gptq", "values"]

LARGEST = 2**31  # bytes of a graph that it takes as an object; of larger ones it wants the file


class Packer:
    """Quantizes linear after linear, as `qlib.tools.onnx_graph.build` hands them over.

    Attributes:
        quick: round plainly, into the format of the kind. keep: keep the weights' values.
        weights: name -> fp32 `[out, in]`; none of dynamic quantization. bytes: of codes, scales and zeros.
        seconds: of the quantizers.
    """

    def __init__(self, options: Options, accuracy: int, quick: bool = False, keep: bool = False) -> None:
        self.options, self.accuracy, self.quick, self.keep = options, accuracy, quick, keep
        self.weights: dict[str, torch.Tensor] = {}
        self.bytes, self.seconds = 0, 0.0

    def __call__(self, part: onnx.ModelProto) -> onnx.ModelProto:
        dynamic = self.options.kind.startswith("dynamic")
        begun = time.perf_counter()
        part = self._dynamic(part) if dynamic else self._blocks(part)
        self.seconds += time.perf_counter() - begun
        if self.keep and not dynamic:
            self.weights |= values(part)[0]
        self.bytes += sum(numpy_helper.to_array(tensor).nbytes for tensor in part.graph.initializer)
        return part

    def _blocks(self, part: onnx.ModelProto) -> onnx.ModelProto:
        options, kind = self.options, "rtn" if self.quick else self.options.kind
        told = {"block_size": options.group_size, "is_symmetric": options.symmetric, "accuracy_level": self.accuracy}
        if options.kind == "hqq":
            told["accuracy_level"] = None  # its quantizer does not pass it on
        if kind == "rtn":
            chosen = nbits.DefaultWeightOnlyQuantConfig(bits=options.bits, **told)
        elif kind == "hqq":
            chosen = nbits.HQQWeightOnlyQuantConfig(block_size=options.group_size, bits=options.bits)
        else:
            chosen = nbits.KQuantWeightOnlyQuantConfig()
        quantizer = nbits.MatMulNBitsQuantizer(part, bits=options.bits, **told, algo_config=chosen)
        with _quietly():
            quantizer.process()
        part = quantizer.model.model
        return _with_float_zeros(part) if self.quick and options.kind == "hqq" else part

    def _dynamic(self, part: onnx.ModelProto) -> onnx.ModelProto:
        with tempfile.TemporaryDirectory() as place, _quietly():
            path = Path(place) / "linear.onnx"
            quantize_dynamic(part, path, per_channel=self.options.kind == "dynamic-channel")
            return onnx.load(path)


def gptq(path: Path, rows: list[dict[str, np.ndarray]], options: Options, accuracy: int) -> onnx.ModelProto:
    """A model whose inputs are `rows`, in 4 bits."""
    chosen = nbits.GPTQWeightOnlyQuantConfig(calibration_data_reader=rows)
    size = sum(file.stat().st_size for file in path.parent.iterdir())
    quantizer = nbits.MatMulNBitsQuantizer(
        onnx.load(path) if size < LARGEST else str(path),
        block_size=options.group_size,
        is_symmetric=options.symmetric,
        accuracy_level=accuracy,
        algo_config=chosen,
    )
    with _quietly():
        quantizer.process()
    return quantizer.model.model


@contextmanager
def _quietly() -> Iterator[None]:
    """Without its progress bars, and the lines it logs of every linear."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def values(model: onnx.ModelProto) -> tuple[dict[str, torch.Tensor], int]:
    """What every MatMulNBits computes with, fp32 `[out, in]` by name of the linear, and the bytes of all of them."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    found, stored = {}, 0
    for node in (node for node in model.graph.node if node.op_type == "MatMulNBits"):
        own = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        codes, scales, *zeros = (numpy_helper.to_array(tensors[name]) for name in node.input[1:] if name)
        stored += codes.nbytes + scales.nbytes + sum(one.nbytes for one in zeros)
        rows, columns, bits, block = (own[name] for name in ("N", "K", "bits", "block_size"))
        blocks = -(-columns // block)
        zero = np.full((rows, blocks), 2 ** (bits - 1)) if not zeros else zeros[0].reshape(rows, -1)
        if zero.dtype == np.uint8:
            zero = _unpack(zero, bits)[:, :blocks]
        levels = _unpack(codes.reshape(rows * blocks, -1), bits).reshape(rows, blocks, block).astype(np.float32)
        weight = (levels - zero[..., None].astype(np.float32)) * scales.reshape(rows, blocks, 1)
        found[node.output[0].removesuffix(".out")] = torch.from_numpy(weight.reshape(rows, -1)[:, :columns].copy())
    return found, stored


def _unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """Codes `[rows, bytes * 8 / bits]` of bytes `[rows, bytes]`, the lowest bits first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((packed[..., None] >> shifts) & np.uint8(2**bits - 1)).reshape(len(packed), -1)


def _with_float_zeros(part: onnx.ModelProto) -> onnx.ModelProto:
    """Zeros as HQQ stores them, one fp32 per block, where plain rounding stores codes. Changes `part`."""
    node = next(node for node in part.graph.node if node.op_type == "MatMulNBits")
    own = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    zeros = next(tensor for tensor in part.graph.initializer if tensor.name == node.input[3])
    wide = _unpack(numpy_helper.to_array(zeros).reshape(own["N"], -1), own["bits"])[:, : own["K"] // own["block_size"]]
    zeros.CopyFrom(numpy_helper.from_array(wide.astype(np.float32).reshape(-1), zeros.name))
    return part
