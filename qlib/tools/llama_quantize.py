"""Quantization by llama.cpp itself. Needs its environment."""

import ctypes
from pathlib import Path
from typing import Any, Mapping, NamedTuple

import llama_cpp
import numpy as np

from qlib.errors import UserError
from qlib.tools.llama_session import failed, messages, start
from qlib.tools.llama_types import ggml

__all__ = ["Tensor", "dequantize", "quantize", "tensors_of"]


class Tensor(NamedTuple):
    """A tensor of a file: the name of its type, its size, and its number of weights."""

    type: str
    bytes: int
    elements: int


class _GgufOptions(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p)]


def tensors_of(file: str | Path) -> dict[str, Tensor]:
    """All tensors of a GGUF file by name, asked of ggml itself: it has types that the gguf package cannot read yet."""
    library, opened, integer, text = ggml(), ctypes.c_void_p, ctypes.c_int64, ctypes.c_char_p
    library.gguf_init_from_file.restype, library.gguf_init_from_file.argtypes = opened, [text, _GgufOptions]
    library.gguf_get_n_tensors.restype, library.gguf_get_n_tensors.argtypes = integer, [opened]
    for name, result in (("name", text), ("type", ctypes.c_int), ("size", ctypes.c_size_t)):
        function = getattr(library, f"gguf_get_tensor_{name}")
        function.restype, function.argtypes = result, [opened, integer]
    library.gguf_free.argtypes = [opened]
    handle = library.gguf_init_from_file(str(file).encode(), _GgufOptions(True, None))
    if not handle:
        raise UserError(f"{file}: is no GGUF file that this llama.cpp can read")
    found = {}
    for index in range(library.gguf_get_n_tensors(handle)):
        type_, size = library.gguf_get_tensor_type(handle, index), library.gguf_get_tensor_size(handle, index)
        count = size // library.ggml_type_size(type_) * library.ggml_blck_size(type_)
        name = library.ggml_type_name(type_).decode().upper()
        found[library.gguf_get_tensor_name(handle, index).decode()] = Tensor(name, size, count)
    library.gguf_free(handle)
    return found


def _importance_matrix(arrays: Mapping[str, np.ndarray]) -> ctypes.Array:
    """The mean squares as llama.cpp takes them; valid as long as the arrays live."""
    entries = (llama_cpp.llama_model_imatrix_data * (len(arrays) + 1))()  # the last one, empty, ends it
    for entry, (name, values) in zip(entries, arrays.items()):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    return entries


def quantize(
    source: str | Path,
    target: str | Path,
    kind: str,
    importance: str | Path | None = None,
    outer: str | None = "F16",
    pure: bool = False,
    threads: int = 1,
) -> dict[str, Any]:
    """Quantize a GGUF file of 16 bits by llama.cpp itself.

    Args:
        kind: such as Q8_0, Q4_0, Q4_K_M, Q2_K, IQ4_NL.
        importance: npz file of what `qlib.export.gguf.importance` returns; llama.cpp weighs errors with it.
        outer: type of embedding and head; None: what llama.cpp takes for this kind. F16 leaves them alone, as ours do.
        pure: every linear in the type of the kind's name, instead of a mixture.

    Returns:
        bits_per_weight of the linears in blocks, types (how many tensors of each), bytes, and the warnings: above all
        which tensors fell back to another type, because a row is no multiple of 256.

    Raises:
        UserError: unknown kind, or llama.cpp refuses.
    """
    known = {name for name in vars(llama_cpp) if name.startswith("LLAMA_FTYPE_MOSTLY_")}
    ftypes = {name.rpartition("MOSTLY_")[2]: getattr(llama_cpp, name) for name in sorted(known)}
    if kind not in ftypes:
        raise UserError(f"kind: '{kind}' is unknown; allowed: {', '.join(ftypes)}")
    start()
    messages.clear()
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread, options.pure = ftypes[kind], threads, pure
    if outer:
        options.output_tensor_type = options.token_embedding_type = getattr(llama_cpp, f"GGML_TYPE_{outer}")
    if importance:
        with np.load(importance) as stored:
            arrays = {name: np.ascontiguousarray(stored[name], dtype=np.float32) for name in stored.files}
        options.imatrix = _importance_matrix(arrays)
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(options)):
        raise failed(f"{kind} is impossible")
    tensors = tensors_of(target)
    types = [one.type for one in tensors.values()]
    inner = {name: one for name, one in tensors.items() if name.startswith("blk.") and name.endswith(".weight")}
    linears = [one for name, one in inner.items() if "_norm." not in name]
    return {
        "kind": kind,
        "bits_per_weight": 8 * sum(one.bytes for one in linears) / sum(one.elements for one in linears),
        "types": {name: types.count(name) for name in sorted(set(types))},
        "bytes": Path(target).stat().st_size,
        "warnings": [line for line in messages if line],
    }


def dequantize(source: str | Path, target: str | Path, threads: int = 1) -> None:
    """Write the fp32 values that a quantized GGUF file stands for, by llama.cpp itself.

    Raises:
        UserError: llama.cpp refuses.
    """
    start()
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread, options.allow_requantize = llama_cpp.LLAMA_FTYPE_ALL_F32, threads, True
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(options)):
        raise failed(f"{source} cannot be read back")
