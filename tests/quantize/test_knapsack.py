"""The knapsack against brute force over all choices."""

import itertools

import numpy as np
import pytest

from qlib.errors import UserError
from qlib.quantize.knapsack import allocate


def least_cost(costs, sizes, bits, budget):
    """Brute force over all allocations."""
    limit = budget * sum(sizes) * (1 + 1e-12)
    totals = []
    for picks in itertools.product(range(len(bits)), repeat=len(sizes)):
        if sum(size * bits[pick] for size, pick in zip(sizes, picks)) <= limit:
            totals.append(sum(costs[row][pick] for row, pick in enumerate(picks)))
    return min(totals)


@pytest.mark.parametrize("kind", ["any", "ties", "falling", "tiny"])
def test_the_allocation_is_the_optimum_of_all(kind):
    generator = np.random.default_rng(0)
    for _ in range(150):
        linears = int(generator.integers(1, 7))
        bits = [int(b) for b in generator.choice([2, 3, 4, 5, 6, 8], int(generator.integers(1, 5)), replace=False)]
        sizes = [int(size) for size in generator.integers(1, 50, linears) * generator.choice([1, 7, 128])]
        costs = generator.random((linears, len(bits)))
        if kind == "ties":
            costs = np.floor(4 * costs)
        elif kind == "falling":
            costs = costs * generator.random((linears, 1)) * 4.0 ** -np.array(bits)
        elif kind == "tiny":
            costs *= 1e-9
        budget = float(generator.choice([min(bits), generator.uniform(min(bits), max(bits)), max(bits)]))
        chosen = allocate(costs, sizes, bits, budget)
        cost = sum(costs[row][bits.index(width)] for row, width in enumerate(chosen))
        assert cost <= least_cost(costs, sizes, bits, budget) * (1 + 1e-9)
        assert sum(size * width for size, width in zip(sizes, chosen)) <= budget * sum(sizes) * (1 + 1e-9)


@pytest.mark.parametrize("sizes", [[4, 4, 4, 4, 12, 12, 12], [8191, 1021, 1024, 8209, 29567, 29567, 29571]])
def test_a_large_model_is_allocated_at_once_and_the_budget_used(sizes):
    generator, bits, sizes = np.random.default_rng(0), [2, 3, 4, 5, 6, 8], np.array(sizes * 80)
    costs = np.exp(generator.normal(0, 1.5, (560, 1))) * 4.0 ** -np.array(bits)
    average = (sizes * allocate(costs, sizes, bits, 5.0)).sum() / sizes.sum()
    assert 4.99 < average <= 5


def test_what_hurts_most_gets_most_bits():
    costs = [[1.0, 0.0], [8.0, 0.0], [2.0, 0.0]]
    assert allocate(costs, [1, 1, 1], [4, 8], 4 + 4 / 3) == [4, 8, 4]
    assert allocate(costs, [1, 1, 1], [4, 8], 4) == [4, 4, 4] and allocate(costs, [1, 1, 1], [4, 8], 8) == [8, 8, 8]
    assert allocate(costs, [1, 9, 1], [4, 8], 4 + 8 / 11) == [8, 4, 8]


def test_a_budget_out_of_range_is_refused_by_the_function_too():
    with pytest.raises(UserError, match="budget: 9 is not allowed; allowed: 4 to 8 bits"):
        allocate([[1.0, 0.0]], [3], [4, 8], 9)
