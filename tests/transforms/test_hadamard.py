"""Hadamard matrices against their definition in exact integers; fast products against dense ones."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlib.transforms.hadamard import hadamard_factor, paley, rotation

#: n, and the factor m of n = m 2^k: hidden and FFN sizes of Qwen models, and others.
SIZES = {
    24576: 12, 29568: 924, 896: 28, 4864: 76, 8192: 1, 5120: 20, 3584: 28, 1536: 12, 27648: 108, 18944: 148, 8960: 140
}  # fmt: skip


@pytest.mark.parametrize("size, factor", SIZES.items())
def test_true_sizes_have_a_small_hadamard_factor(size, factor):
    matrix = hadamard_factor(size)
    assert len(matrix) == factor and matrix.abs().eq(1).all()
    assert torch.equal(matrix @ matrix.T, factor * torch.eye(factor, dtype=torch.int64))
    assert rotation(size, torch.Generator().manual_seed(0)).name == f"hadamard {factor} x {size // factor}"


#: Below 100: one more than these primes, 3 modulo 4; twice one more than these, 1 modulo 4.
FIRST, SECOND = (3, 7, 11, 19, 23, 31, 43, 47, 59, 67, 71, 79, 83), (5, 13, 17, 29, 37, 41)


def test_every_matrix_that_paley_makes_is_one_of_hadamard():
    orders = [order for order in range(1, 100) if paley(order) is not None]
    assert set(orders) == {prime + 1 for prime in FIRST} | {2 * (prime + 1) for prime in SECOND}
    for order in orders:
        matrix = paley(order)
        assert matrix.abs().eq(1).all()
        assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.int64)), order


def sylvester(doublings):
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(doublings):
        matrix = torch.kron(matrix, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    return matrix


@settings(max_examples=40, deadline=None)
@given(odd=st.sampled_from([1, 3, 5, 7, 11, 19, 23]), doublings=st.integers(0, 6), seed=st.integers(0, 99))
def test_the_fast_product_is_the_dense_one(odd, doublings, seed):
    generator = torch.Generator().manual_seed(seed)
    size = odd * 2**doublings
    fast = rotation(size, generator)
    left = size // len(fast.factor)
    dense = torch.kron(fast.factor.contiguous(), sylvester(left.bit_length() - 1) / left**0.5)
    rows = torch.randn(3, size, generator=generator, dtype=torch.float64)
    assert torch.allclose(fast(rows), (rows * fast.signs) @ dense, atol=1e-12)
    whole = fast(torch.eye(size, dtype=torch.float64))
    assert torch.allclose(whole @ whole.T, torch.eye(size, dtype=torch.float64), atol=1e-12)


def test_the_last_resort_says_that_it_is_random_and_is_orthogonal():
    assert hadamard_factor(3) is None and hadamard_factor(94) is None and hadamard_factor(11008) is None
    fast = rotation(43 * 4 // 2, torch.Generator().manual_seed(1))
    assert fast.name == "random orthogonal 43 x 2"
    whole = fast(torch.eye(86, dtype=torch.float64))
    assert torch.allclose(whole @ whole.T, torch.eye(86, dtype=torch.float64), atol=1e-12)


def test_a_large_rotation_keeps_lengths_and_takes_no_large_matrix():
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(2, 29568, generator=generator)
    turned = rotation(29568, generator)(rows)
    assert torch.allclose(turned.norm(dim=1), rows.norm(dim=1), rtol=1e-5)
    assert not torch.equal(turned, rotation(29568, torch.Generator().manual_seed(3))(rows))
