"""From which sparsity on a sparse product pays on this CPU: torch's CSR and BSR against dense, one linear of Qwen-72B.

Unstructured pruning leaves zeros anywhere: CSR, with random masks. BSR keeps whole blocks, here random ones. Both have the
form in which torch multiplies them fastest: fp32 values and int32 indices, which MKL takes as they are. It has no bf16, and
torch converts int64 at every call; `torch.sparse.mm` with a reduction takes bf16 but is several times slower. Dense bf16 has
its own fastest form.

The figure is the sparsity at which both take the same time, on a straight line between the logarithms of density and time;
1 where no sparsity tested pays. It answers a question and has no target.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from qlib.bench.rows import Row, missing
from qlib.evaluate import parts
from qlib.evaluate.fastest import PlainLinear, fastest_form
from qlib.evaluate.roofline import ReadProbe
from qlib.evaluate.timing import exclusive, median_interval, time_rounds
from qlib.models.shapes import Shape, find_shape

__all__ = [
    "measure", "sparse_weights", "random_sparse", "multiply", "packed_linear", "time_products", "crossing", "sparse_row",
]  # fmt: skip

SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
BATCHES, ROUNDS = (1, 16), 15
LINEAR, DENSE, PACKED = "mlp.down_proj", "bf16", "int4-g128"
#: Sparse format -> side of the blocks that stay or go whole.
BLOCKS = {"CSR": 1, "BSR": 32}
CPU = torch.device("cpu")
DRAWN = 2**24  # numbers that are drawn at a time

#: Sparse format -> sparsity -> matrix `[out, in]`.
Weights = Mapping[str, Mapping[float, torch.Tensor]]


def measure(root: Path) -> list[Row]:
    """For one row and a small batch, one row for each sparse format."""
    if not torch.backends.mkl.is_available():
        names = [_name(rows, kind) for rows in BATCHES for kind in BLOCKS]
        return [missing(name, "", "fraction", "this torch has no MKL") for name in names]
    shape = find_shape("qwen-72b")
    with exclusive(), torch.inference_mode():
        sparse, packed = sparse_weights(shape.linears[LINEAR]), packed_linear(shape)
        timed = {rows: time_products(sparse, packed, rows) for rows in BATCHES}
    return [sparse_row(kind, rows, *found) for rows, found in timed.items() for kind in BLOCKS]


def sparse_weights(size: tuple[int, int], seed: int = 0) -> Weights:
    """Random weights `[out, in]` of every format and sparsity."""
    generator = torch.Generator().manual_seed(seed)
    return {kind: {s: random_sparse(size, s, block, generator) for s in SPARSITIES} for kind, block in BLOCKS.items()}


def random_sparse(size: tuple[int, int], sparsity: float, block: int, generator: torch.Generator) -> torch.Tensor:
    """A random matrix of which about the share `sparsity` is zero: CSR, or BSR with zeros in whole blocks `[block, block]`.

    It is never held dense.
    """
    down, across = size[0] // block, size[1] // block
    columns, counts = [], [torch.zeros(1, dtype=torch.int64)]
    for rows in torch.arange(down).split(max(1, DRAWN // across)):
        kept = torch.empty(len(rows), across).uniform_(generator=generator) >= sparsity
        columns.append(kept.nonzero()[:, 1].int())
        counts.append(kept.sum(1))
    index = (torch.cat(counts).cumsum(0).int(), torch.cat(columns))
    values = parts.random_tensor((len(index[1]), block, block), CPU, generator).float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls both formats beta
        if block == 1:
            return torch.sparse_csr_tensor(*index, values.flatten(), size, check_invariants=False)
        return torch.sparse_bsr_tensor(*index, values, size, check_invariants=False)


def multiply(matrix: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """x `[rows, in]` times a sparse `[out, in]`, `[rows, out]` in the dtype of x, as a layer would do it.

    Not by `F.linear`: for several rows that is three times slower. For one row of CSR a vector is faster than a matrix.
    """
    numbers = x.float()
    if len(x) == 1 and matrix.layout == torch.sparse_csr:
        return (matrix @ numbers[0])[None].to(x.dtype)
    return (matrix @ numbers.t()).t().to(x.dtype)


def packed_linear(shape: Shape) -> nn.Module:
    """Our packed layer of the same size."""
    slim = replace(shape, heads=1, kv_heads=1)  # the attention is not used
    layer, _ = parts.build_layer(slim, PACKED, PlainLinear, CPU, torch.Generator().manual_seed(0))
    return layer.get_submodule(LINEAR)


def time_products(sparse: Weights, packed: nn.Module, rows: int, rounds: int = ROUNDS) -> tuple[dict[str, np.ndarray], str]:
    """Milliseconds of one linear for `rows` rows: ``bf16``, ``int4-g128``, ``CSR 0.5`` and so on, `[rounds]` each.

    All take turns. At both ends of a round, where a call comes up twice, a buffer larger than the cache is read: ``first``
    and ``last``.

    Returns:
        The times, and how dense bf16 was held.
    """
    size, generator = (packed.out_features, packed.in_features), torch.Generator().manual_seed(0)
    weight, x = parts.random_tensor(size, CPU, generator), parts.random_tensor((rows, size[1]), CPU, generator, scale=1.0)
    form, _ = fastest_form(weight, rows)
    probe = ReadProbe(CPU)
    calls = {"first": probe, DENSE: partial(form(weight), x), PACKED: partial(packed, x)}
    for kind, matrices in sparse.items():
        calls |= {f"{kind} {sparsity:g}": partial(multiply, matrix, x) for sparsity, matrix in matrices.items()}
    calls["last"] = probe
    return dict(time_rounds({name: [call] for name, call in calls.items()}, rounds, CPU).rounds), form.name


def crossing(sparsities: Sequence[float], ratios: Sequence[float]) -> float:
    """The sparsity from which on the ratio of sparse to dense time stays below 1.

    Args:
        sparsities: ascending. ratios: at these.

    Returns:
        The first of `sparsities` if all pay; 1 if the last does not.
    """
    slow = [at for at, ratio in enumerate(ratios) if ratio > 1]
    if not slow:
        return float(sparsities[0])
    at = slow[-1]
    if at + 1 == len(ratios):
        return 1.0
    above, below = np.log(ratios[at]), np.log(ratios[at + 1])
    first, second = np.log1p(-np.asarray(sparsities[at : at + 2], dtype=float))
    return float(1 - np.exp(first + (second - first) * above / (above - below)))


def sparse_row(kind: str, rows: int, times: Mapping[str, np.ndarray], form: str) -> Row:
    """One sparse format, from the times of the rounds; the interval is over the crossings of single rounds."""
    points = {s: times[f"{kind} {s:g}"] for s in SPARSITIES}
    ratios = np.stack([values / times[DENSE] for values in points.values()])  # [sparsities, rounds]
    found, low, high = median_interval(np.array([crossing(SPARSITIES, column) for column in ratios.T]))
    spent = ", ".join(f"{s:g}: {np.median(values):.2f} ms" for s, values in points.items())
    dense = "; ".join(f"{name} {np.median(times[name]):.2f} ms" for name in (DENSE, PACKED))
    block = "" if BLOCKS[kind] == 1 else f" in blocks of {BLOCKS[kind]} x {BLOCKS[kind]}"
    held = f"fp32 values{block} and int32 indices, MKL; dense as {form}; {torch.get_num_threads()} threads"
    none = "; no sparsity tested pays" if found == 1 else ""
    return Row(_name(rows, kind), "", found, "fraction", None, low, high, f"{kind} {spent}; {dense}; {held}{none}")


def _name(rows: int, kind: str) -> str:
    return f"72B down_proj, {rows} row{'s' if rows > 1 else ''}: sparsity from which {kind} is faster than bf16"
