"""What pruning a true layer takes is held against what it must hold."""

import pytest

from qlib.bench import bench_pruning
from qlib.bench.bench_pruning import METHODS, Cost, must_hold, prune_layer
from qlib.models.shapes import Shape, find_shape

SMALL = Shape("small", 1, 128, 1, 1, 256, 64)


def test_what_a_layer_of_72b_must_hold():
    held = must_hold(find_shape("qwen-72b"), "sparsegpt", tokens=1000)
    square, wide = 8192 * 8192, 8192 * 24576
    assert list(held.values()) == [2 * (4 * square + 3 * wide), 4 * wide, 2000 * (8192 + 3 * 24576), 8 * 24576**2]
    assert list(must_hold(find_shape("qwen-72b"), "wanda", tokens=1000).values()) == list(held.values())[:3]


def test_rows_hold_time_and_memory_against_their_bounds(monkeypatch, tmp_path):
    bound = sum(must_hold(find_shape("qwen-72b"), "wanda").values())
    monkeypatch.setattr(bench_pruning, "in_child", lambda work, shape, method: Cost(61.0, 2 * bound))
    rows = {row.name: row for row in bench_pruning.measure(tmp_path)}
    assert len(rows) == 4
    wanda, sparsegpt = rows["72B layer, Wanda: seconds"], rows["72B layer, SparseGPT: seconds"]
    assert (wanda.met, sparsegpt.met) == (False, True)
    memory = rows["72B layer, Wanda: peak memory beyond the layer, over what it must hold"]
    assert (memory.measured, memory.met) == (2, False)
    assert f"{2 * bound / 1e9:.2f} GB beyond the layer's 1.74 GB; must hold weights again 1.74 + largest" in memory.how


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_is_pruned_and_its_cost_is_what_came_on_top(method, monkeypatch):
    held = []

    def hold(subject, recipe, windows):
        held.append(recipe[0] | {"tokens": sum(batch.numel() for batch in windows)})
        return compress(subject, recipe, windows)

    compress = bench_pruning.compress
    monkeypatch.setattr(bench_pruning, "SAMPLES", 3)
    monkeypatch.setattr(bench_pruning, "LENGTH", 32)
    monkeypatch.setattr(bench_pruning, "compress", hold)
    cost = prune_layer(SMALL, method)
    assert held == [{"pass": method, "sparsity": 0.5, "tokens": 96}]
    assert cost.seconds > 0 and 0 <= cost.peak < 2**30
