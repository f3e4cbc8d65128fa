"""Clip search against a dense search in float64, and the orders that more bits and smaller groups must have."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from qlib.errors import UserError
from qlib.models.load import locate
from qlib.quantize import clip
from qlib.quantize import grid as grids
from qlib.quantize.grid import Grid, fit_grid, round_to_grid

BITS = (2, 3, 4, 5, 6, 8)
INTEGERS = [Grid(b, g, s) for b in BITS for g in (None, 32, 64) for s in (False, True)]
FLOATS = [
    Grid(8, None, True, "fp8"), Grid(8, "tensor", True, "fp8"), Grid(4, 32, True, "mxfp4"), Grid(4, 16, True, "nvfp4")
]  # fmt: skip
GRIDS = INTEGERS + FLOATS + [Grid(4, 32, real_zero=True)]


def errors(weight, grid, fit, importance=None):
    """Weighted squared error of every group in float64, from the definition of what a compressed weight means."""
    difference = round_to_grid(weight, grid, *fit).dequantize().double() - weight.double()
    weighted = difference.square() * (1 if importance is None else importance.double())
    return weighted.view(*fit.scales.shape, -1).sum(-1)


def heavy_tails(rows, columns, seed=0):
    """Weights with outliers (Student's t with 3 degrees of freedom), and importances that differ by orders."""
    generator = np.random.default_rng(seed)
    draw = generator.standard_t(3, (rows, columns)), generator.lognormal(0, 1, columns)
    return [torch.from_numpy(one).float() for one in draw]


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(GRIDS), st.integers(1, 6), st.integers(1, 3), st.integers(0, 2**30), st.booleans())
def test_no_group_is_worse_than_without_search(grid, rows, groups, seed, weighted):
    w, importance = heavy_tails(rows, 64 * groups, seed)
    importance = importance if weighted else None
    found = clip.fit(w, grid, "activations" if weighted else "mse", importance)
    start = fit_grid(w, grid)
    assert [one.dtype for one in found[:2]] == [one.dtype for one in start[:2]]
    before, after = errors(w, grid, start, importance), errors(w, grid, found, importance)
    if grid.group_size == "tensor":
        before, after = before.sum(), after.sum()
    assert (after <= before * (1 + 1e-4) + 1e-12).all()  # the search compares fp32 sums
    assert all(torch.equal(a, b) for a, b in zip(clip.fit(w, grid, "none")[:2], start))


@pytest.mark.parametrize("bits", (2, 3, 4))
@pytest.mark.parametrize("symmetric", (False, True))
@pytest.mark.parametrize("weighted", (False, True))
def test_little_is_left_to_a_dense_search(bits, symmetric, weighted):
    w, importance = heavy_tails(64, 64)
    importance = importance if weighted else torch.ones(64)
    grid = Grid(bits, None, symmetric)
    scale, levels, best = (w.amax(1) - w.amin(1)).double()[:, None] / (2**bits - 1), 2**bits, np.inf
    for zero in [levels // 2] if symmetric else range(levels):
        for factor in torch.linspace(0.1, 1.5, 141).tolist():
            for sign in (1, -1):
                step = sign * factor * scale
                rounded = ((w / step).round() + zero).clamp(0, levels - 1) - zero
                found = ((rounded * step - w).square() * importance).sum(1)
                best = np.minimum(best, found.numpy())
    got = errors(w, grid, clip.fit(w, grid, "activations", importance), importance)
    assert got.sum() < 1.05 * best.sum()
    assert got.sum() < 0.95 * errors(w, grid, fit_grid(w, grid), importance).sum()


@pytest.mark.parametrize("grid", FLOATS[2:], ids=lambda grid: grid.name)
def test_scales_of_four_bit_floats_are_all_but_the_best_there_are(grid):
    w, _ = heavy_tails(32, 64)
    start, best = fit_grid(w, grid), np.inf
    for code in range(1, 127):
        shift = code - 63 if grid.element == "mxfp4" else None
        scales = torch.full(start.scales.shape, code, dtype=torch.uint8).view(torch.float8_e4m3fn)
        if shift is not None:
            scales = (start.scales.view(torch.uint8).int() + shift).clamp(1, 254).to(torch.uint8)
            scales = scales.view(torch.float8_e8m0fnu)
        best = np.minimum(best, errors(w, grid, start._replace(scales=scales)).numpy())
    assert errors(w, grid, clip.fit(w, grid, "mse")).sum() < 1.01 * best.sum()


def test_importance_is_what_decides():
    w, importance = heavy_tails(16, 128, seed=1)
    for grid in (Grid(3, 64), Grid(3, 64, True), *FLOATS[2:]):
        plain, weighted = clip.fit(w, grid, "mse", importance), clip.fit(w, grid, "activations", importance)
        assert errors(w, grid, weighted, importance).sum() < errors(w, grid, plain, importance).sum()
        assert errors(w, grid, weighted).sum() > errors(w, grid, plain).sum()
    nothing = clip.fit(w, Grid(3, 64), "activations", torch.zeros(128))  # inputs that are always 0 decide nothing
    assert torch.equal(nothing.scales, fit_grid(w, Grid(3, 64)).scales)
    with pytest.raises(UserError, match="^calibration: "):
        clip.fit(w, Grid(3, 64), "activations")


@pytest.mark.parametrize("grid", (Grid(3, 32), FLOATS[1], FLOATS[3]), ids=lambda grid: grid.name)
def test_slices_and_single_groups_of_columns_give_the_same(grid, monkeypatch):
    w, importance = heavy_tails(10, 96, seed=2)
    whole = clip.fit(w, grid, "activations", importance)
    size = grid.group_size if isinstance(grid.group_size, int) else 96
    columns = Grid(grid.bits, grid.group_size if grid.element != "int" else None, grid.symmetric, grid.element)
    for at in range(0, 96, size):
        part = clip.fit(w[:, at : at + size], columns, "activations", importance[at : at + size], whole.tensor_scale)
        assert torch.equal(part.scales[:, 0].float(), whole.scales[:, at // size].float())
        assert torch.equal(part.zeros[:, 0], whole.zeros[:, at // size])
    monkeypatch.setattr(grids, "SLICE", 200)
    sliced = clip.fit(w, grid, "activations", importance)
    assert torch.equal(sliced.scales.float(), whole.scales.float()) and torch.equal(sliced.zeros, whole.zeros)


@pytest.fixture(scope="module")
def linears():
    """All linears of the reference model as rows of 128 weights, and how many rows each has."""
    tensors = load_file(locate("reference-2").folder / "model.safetensors")
    weights = [tensor.float() for name, tensor in sorted(tensors.items()) if name.endswith("proj.weight")]
    return torch.cat([weight.view(-1, 128) for weight in weights]), [weight.numel() // 128 for weight in weights]


@pytest.mark.parametrize("how", ("none", "mse"))
def test_order_of_the_formats_on_every_linear_of_the_reference_model(linears, how):
    rows, counts = linears

    def error(*grid):
        found = errors(rows, Grid(*grid), clip.fit(rows, Grid(*grid), how)).sum(1)
        return torch.stack([part.sum() for part in found.split(counts)])  # of each linear

    found = {(bits, size): error(bits, size) for bits in BITS for size in (32, 64, 128)}
    for size in (32, 64, 128):
        assert all((found[more, size] < found[fewer, size]).all() for fewer, more in zip(BITS, BITS[1:]))
    for bits in BITS:
        assert (found[bits, 32] <= found[bits, 64]).all() and (found[bits, 64] <= found[bits, 128]).all()
        # At 2 bits the two are all but the same: a negative scale is the other one of the two zeros that matter.
        assert (found[bits, 128] <= error(bits, 128, True) * (1 if how == "none" else 1.001)).all()
