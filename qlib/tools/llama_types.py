"""ggml's types of blocks, asked of the library itself: it has some that the gguf package cannot write yet."""

import ctypes
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import llama_cpp
import numpy as np

__all__ = ["Block", "block_of", "encode", "ggml"]


class Block(NamedTuple):
    """A type: its number in files, the weights of a block, and their bytes with the scales."""

    number: int
    weights: int
    bytes: int


@lru_cache(maxsize=1)
def ggml() -> ctypes.CDLL:
    """The library below llama.cpp, of which the Python binding knows nothing."""
    library = ctypes.CDLL(str(Path(llama_cpp.__file__).with_name("lib") / "libggml-base.so"))
    floats, size, integer = ctypes.POINTER(ctypes.c_float), ctypes.c_size_t, ctypes.c_int64
    library.ggml_type_name.restype = ctypes.c_char_p
    library.ggml_type_size.restype, library.ggml_blck_size.restype = size, integer
    library.ggml_quantize_chunk.restype = size
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, floats, ctypes.c_void_p, integer, integer, integer, floats]
    return library


def block_of(name: str) -> Block:
    """The type of a name such as Q4_K, IQ2_S or F16."""
    number = getattr(llama_cpp, f"GGML_TYPE_{name}")
    return Block(number, ggml().ggml_blck_size(number), ggml().ggml_type_size(number))


def encode(values: np.ndarray, name: str) -> np.ndarray:
    """Bytes of `values [rows, in]`, fp32, in a type; every input is as important as the others."""
    block, floats, (rows, columns) = block_of(name), ctypes.POINTER(ctypes.c_float), values.shape
    data, importance = np.empty(values.size // block.weights * block.bytes, np.uint8), np.ones(columns, np.float32)
    pointers = np.ascontiguousarray(values, np.float32).ctypes.data_as(floats), data.ctypes.data
    ggml().ggml_quantize_chunk(block.number, *pointers, 0, rows, columns, importance.ctypes.data_as(floats))
    return data
