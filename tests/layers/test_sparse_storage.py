"""Pruned weights without their zeros: bit by bit the same when read, as large as arithmetic says, refused when spoilt."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlib.errors import UserError
from qlib.layers.sparse_storage import pays, sparse_bytes, sparse_codes, sparse_floats, sparse_tensors
from qlib.quantize.formats import Grid
from qlib.quantize.grid import fit_grid, round_to_grid

GRIDS = [Grid(bits, 32, symmetric) for bits in (2, 3, 4, 5, 6, 8) for symmetric in (False, True)]
GRIDS += [Grid(4, None), Grid(8, None, True, "fp8"), Grid(4, 32, True, "mxfp4"), Grid(4, 16, True, "nvfp4")]


def pruned(rows: int, width: int, share: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator)
    return weight * (torch.rand(rows, width, generator=generator) < share)


def size_of(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(GRIDS), st.integers(1, 9), st.integers(1, 4), st.floats(0, 1), st.integers(0, 99))
def test_codes_come_back(grid, rows, groups, share, seed):
    weight = pruned(rows, 32 * groups, share, seed)
    compressed = round_to_grid(weight, grid, *fit_grid(weight, grid))
    tensors, survivors = sparse_tensors(compressed), int((compressed.dequantize() != 0).sum())
    again = sparse_codes(grid, tensors, tuple(weight.shape), survivors)
    assert torch.equal(again.dequantize(), compressed.dequantize())
    if grid.element == "int":  # floats have a -0, which comes back as 0
        assert torch.equal(again.codes, compressed.codes)
    for part in ("scales", "zeros"):
        assert torch.equal(getattr(again, part).float(), getattr(compressed, part).float())
    if pays(grid, tuple(weight.shape), survivors):
        assert size_of(tensors) == sparse_bytes(grid, tuple(weight.shape), survivors)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 70), st.floats(0, 1), st.integers(0, 99))
def test_floats_come_back(rows, width, share, seed):
    weight = pruned(rows, width, share, seed).bfloat16()
    tensors, survivors = sparse_tensors(weight), int((weight != 0).sum())
    assert torch.equal(sparse_floats(tensors, tuple(weight.shape), survivors), weight)
    if pays(None, tuple(weight.shape), survivors):
        assert size_of(tensors) == sparse_bytes(None, tuple(weight.shape), survivors)
    assert sparse_bytes(None, tuple(weight.shape), survivors) <= weight.nbytes


def test_the_mask_is_a_bit_for_every_weight():
    weight = torch.zeros(2, 16, dtype=torch.bfloat16)
    weight[0, 0], weight[0, 9], weight[1, 15] = 1, 2, 3
    tensors = sparse_tensors(weight)
    assert tensors["mask"].tolist() == [[1, 2], [0, 128]] and tensors["values"].tolist() == [1, 2, 3]


def test_what_does_not_pay_and_what_cannot_be_left_out():
    shape = (64, 64)
    assert pays(None, shape, 64 * 60 - 1) and not pays(None, shape, 64 * 60)  # a bit of sixteen
    assert pays(Grid(4, 32), shape, 64 * 48 - 2) and not pays(Grid(4, 32), shape, 64 * 48)  # a bit of four
    assert not pays(Grid(4, 32, real_zero=True), shape, 0)
    assert sparse_bytes(None, shape, 64 * 64) == 2 * 64 * 64


def test_spoilt_tensors_are_refused():
    weight = pruned(4, 32, 0.5).bfloat16()
    tensors, survivors = sparse_tensors(weight), int((weight != 0).sum())
    with pytest.raises(UserError, match=f"keeps {survivors} weights, expected {survivors - 1}"):
        sparse_floats(tensors, (4, 32), survivors - 1)
    with pytest.raises(UserError, match="'values' of a pruned weight is torch.bfloat16"):
        sparse_floats(tensors | {"values": tensors["values"][1:]}, (4, 32), survivors)
    with pytest.raises(UserError, match="'mask' of a pruned weight is missing"):
        sparse_floats({"values": tensors["values"]}, (4, 32), survivors)
    compressed = round_to_grid(weight.float(), Grid(4, 32), *fit_grid(weight.float(), Grid(4, 32)))
    parts, left = sparse_tensors(compressed), int((compressed.dequantize() != 0).sum())
    with pytest.raises(UserError, match="'codes' of a pruned weight is torch.uint8"):
        sparse_codes(Grid(4, 32), parts | {"codes": parts["codes"][:-1]}, (4, 32), left)
    with pytest.raises(UserError, match="'scales' is missing"):
        sparse_codes(Grid(4, 32), {n: t for n, t in parts.items() if n != "scales"}, (4, 32), left)
