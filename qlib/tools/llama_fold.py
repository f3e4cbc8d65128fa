"""Rows too short for llama.cpp's superblocks, taken together: for quantizing and reading back, not for running."""

from math import gcd
from pathlib import Path

import numpy as np
from gguf import GGUFReader

__all__ = ["SUPERBLOCK", "fold"]

SUPERBLOCK = 256  # weights of a row that share a 16-bit scale in K-quants and most IQ types


def fold(file: Path, importance: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[int, int]]:
    """Make rows of a GGUF file's linears multiples of 256 long, in place: `[out, in]` becomes `[out / n, n in]`.

    Rows lie one behind the other, so that nothing but the dimensions in the header changes. What is quantized then has
    as many bits for each weight as long rows have; only the 16-bit scales are shared by n rows. llama.cpp compares
    dimensions with the model's only where it loads a file to run it.

    Args:
        importance: tensor -> fp32 `[in]`; these tensors are folded, where their number of rows allows it.

    Returns:
        the importance of the new rows, and how many were taken together by length; empty: all rows were long enough.
    """
    taken: dict[int, int] = {}
    importance = dict(importance)
    for tensor in GGUFReader(file, "r+").tensors:
        if tensor.name in importance:
            dimensions = tensor.field.parts[3]  # behind length, name and number of dimensions: [in, out] of the header
            columns, rows = map(int, dimensions)
            count = SUPERBLOCK // gcd(SUPERBLOCK, columns)
            if count > 1 and rows % count == 0:
                dimensions[:] = columns * count, rows // count
                importance[tensor.name] = np.tile(importance[tensor.name], count)
                taken[columns] = count
    return importance, taken
