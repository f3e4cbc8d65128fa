"""Sparse products are right, and where they begin to pay follows from the times."""

import numpy as np
import pytest
import torch

from qlib.bench import bench_sparse
from qlib.bench.bench_sparse import BLOCKS, LINEAR, SPARSITIES, crossing, multiply, random_sparse, sparse_row
from qlib.evaluate.fastest import PlainLinear
from qlib.evaluate.timing import Timed
from qlib.models.shapes import Shape

SIZE = (96, 160)
SMALL = Shape("small", 1, 128, 1, 1, 256, 64)


def drawn(kind: str, sparsity: float = 0.7, size: tuple[int, int] = SIZE) -> torch.Tensor:
    return random_sparse(size, sparsity, BLOCKS[kind], torch.Generator().manual_seed(1))


def times(at: float, rounds: int = 5) -> dict[str, np.ndarray]:
    """Of sparse kernels whose time is proportional to the density and equals that of bf16 at the sparsity `at`."""
    spread = np.linspace(0.9, 1.1, rounds)  # of all alike: a machine that becomes slower
    found = {"bf16": 20 * spread, "int4-g128": 5 * spread}
    return found | {f"{kind} {s:g}": 20 * (1 - s) / (1 - at) * spread for kind in BLOCKS for s in SPARSITIES}


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("kind", BLOCKS)
def test_a_product_equals_the_dense_one(kind, rows):
    matrix, x = drawn(kind), torch.randn(rows, SIZE[1], generator=torch.Generator().manual_seed(2))
    wanted = x.double() @ matrix.to_dense().double().t()
    assert wanted.norm() > 0 and torch.allclose(multiply(matrix, x).double(), wanted, atol=1e-6)
    assert (multiply(matrix, x.bfloat16()).dtype, multiply(matrix, x).shape) == (torch.bfloat16, (rows, SIZE[0]))


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_random_matrix_keeps_its_share_in_whole_blocks(kind, monkeypatch):
    monkeypatch.setattr(bench_sparse, "DRAWN", 1000)  # so that it is drawn in several parts
    block, size = BLOCKS[kind], (32 * 40, 32 * 50)
    matrix = drawn(kind, 0.7, size)
    make = torch.sparse_csr_tensor if block == 1 else torch.sparse_bsr_tensor
    parts = (matrix.crow_indices(), matrix.col_indices(), matrix.values())
    assert [part.dtype for part in parts] == [torch.int32, torch.int32, torch.float32]
    make(*parts, size, check_invariants=True)  # or it raises
    blocks = (matrix.to_dense() != 0).unflatten(0, (-1, block)).unflatten(2, (-1, block)).float().mean((1, 3))
    assert ((blocks == 0) | (blocks > 0.9)).all()
    assert (blocks == 0).float().mean().item() == pytest.approx(0.7, abs=0.03)


def test_the_crossing_of_a_power_law_is_exact():
    for at in (0.55, 0.85, 0.985):
        for power in (0.5, 1, 2):
            ratios = [((1 - s) / (1 - at)) ** power for s in SPARSITIES]
            assert crossing(SPARSITIES, ratios) == pytest.approx(at)


@pytest.mark.parametrize(
    "ratios, wanted",
    [([0.9, 0.5, 0.1], 0.5), ([3, 2, 1.1], 1), ([0.9, 0.8, 1.1], 1), ([2, 1, 0.5], 0.8), ([0.5, 2, 0.5], 1 - 0.02**0.5)],
)
def test_only_what_pays_from_there_on_counts(ratios, wanted):
    assert crossing((0.5, 0.8, 0.9), ratios) == pytest.approx(wanted)


def test_a_row_tells_the_crossing_and_every_time():
    row = sparse_row("CSR", 16, times(0.85), "bf16, F.linear")
    assert row.name == "72B down_proj, 16 rows: sparsity from which CSR is faster than bf16"
    assert (row.measured, row.low, row.high) == pytest.approx((0.85, 0.85, 0.85)) and (row.met, row.target) == (None, "")
    assert row.how.startswith("CSR 0.5: 66.67 ms, 0.7: 40.00 ms, ") and "; bf16 20.00 ms; int4-g128 5.00 ms; " in row.how
    assert "blocks of 32 x 32" in sparse_row("BSR", 1, times(0.85), "").how and "no sparsity" not in row.how


def test_where_no_sparsity_pays_the_row_says_so():
    row = sparse_row("BSR", 1, times(0.999), "")
    assert row.measured == 1 and row.how.endswith("; no sparsity tested pays")


def test_everything_is_timed_in_the_same_rounds(monkeypatch):
    monkeypatch.setattr(bench_sparse, "SPARSITIES", (0.5, 0.7))
    monkeypatch.setattr(bench_sparse, "fastest_form", lambda weight, rows: (PlainLinear, {}))
    monkeypatch.setattr(bench_sparse, "ReadProbe", lambda device: None)
    shapes = []

    def time_once(calls, rounds, device):
        names = list(calls)
        assert (names[0], names[-1], rounds) == ("first", "last", 3)  # what reads more than the cache stands at the ends
        shapes.extend(calls[name][0]().shape for name in names[1:-1])
        return Timed({name: np.ones(rounds) for name in names}, 0, True)

    monkeypatch.setattr(bench_sparse, "time_rounds", time_once)
    with torch.inference_mode():
        sparse, packed = bench_sparse.sparse_weights(SMALL.linears[LINEAR]), bench_sparse.packed_linear(SMALL)
        found, form = bench_sparse.time_products(sparse, packed, 2, rounds=3)
    assert list(found)[1:-1] == ["bf16", "int4-g128", "CSR 0.5", "CSR 0.7", "BSR 0.5", "BSR 0.7"]
    assert shapes == [(2, SMALL.hidden)] * 6 and form == PlainLinear.name


def test_without_mkl_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    rows = bench_sparse.measure(tmp_path)
    assert len(rows) == 4 and {row.how for row in rows} == {"not measured: this torch has no MKL"}
