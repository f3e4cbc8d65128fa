"""Kernels of rounding and packing give the bits that torch's operators give."""

import pytest
import torch

from qlib.layers import int4_blocks, native_rounding
from qlib.layers.storage import pack_bits, unpack_bits
from qlib.quantize.grid import Grid, fit_grid, ranges, round_to_grid

pytestmark = pytest.mark.skipif(bool(native_rounding.missing()), reason=native_rounding.missing())
GRIDS = [Grid(4, 128), Grid(4, 32, symmetric=True), Grid(3, 64), Grid(2, 96, real_zero=True), Grid(8), Grid(8, symmetric=True)]


@pytest.fixture
def torch_only(monkeypatch):
    """Calls a function with torch's operators alone."""

    def run(function, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(native_rounding, "missing", lambda: "switched off")
            return function(*arguments)

    return run


def weights(out_features: int, in_features: int):
    torch.manual_seed(0)
    weight = torch.randn(out_features, in_features)
    weight[0] = 0
    weight[1] = weight[1].abs()
    weight[2] = (torch.arange(in_features) % 16 - 8) / 2  # ties
    weight[3] *= 1e30
    weight[4] *= 1e-30
    weight[5, ::2] = 0
    return weight.bfloat16()


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid.name}-{grid.symmetric}-{grid.real_zero}")
def test_rounding(grid, torch_only):
    for out_features, in_features in ((70, 384), (9, 1152), (64, grid.group_size * 5 if grid.group_size else 37)):
        weight = weights(out_features, in_features)
        for found, wanted in zip(ranges(weight, grid), torch_only(ranges, weight, grid)):
            assert found.dtype == torch.float32 and torch.equal(found, wanted)
        fit = fit_grid(weight, grid)
        for found, wanted in zip(fit, torch_only(fit_grid, weight, grid)):
            assert (found is None and wanted is None) or torch.equal(found, wanted)
        narrow = fit._replace(scales=(fit.scales * 0.7).bfloat16())  # so that codes are cut off at both ends
        for one in (fit, narrow):
            found, wanted = round_to_grid(weight, grid, *one), torch_only(round_to_grid, weight, grid, *one)
            assert torch.equal(found.codes, wanted.codes) and found.codes.dtype == torch.uint8


def test_a_weight_that_is_no_number_is_not_overlooked(torch_only):
    weight = weights(8, 256)
    weight[6, 3], weight[7, 200] = float("nan"), float("inf")
    for found, wanted in zip(ranges(weight, Grid(4, 128)), torch_only(ranges, weight, Grid(4, 128))):
        assert torch.equal(found.isnan(), wanted.isnan()) and found.isnan().sum() == 1
        assert torch.equal(found.nan_to_num(), wanted.nan_to_num())


def test_a_part_of_a_weight_is_left_to_torch():
    weight = weights(70, 512)[:, 128:256]
    assert not native_rounding.takes(weight, torch.bfloat16) and not native_rounding.takes(weight.float(), torch.bfloat16)
    assert torch.equal(round_to_grid(weight, GRIDS[0], *fit_grid(weight, GRIDS[0])).codes,
                       round_to_grid(weight.contiguous(), GRIDS[0], *fit_grid(weight.contiguous(), GRIDS[0])).codes)  # fmt: skip


@pytest.mark.parametrize("shape", [(1, 2), (7, 130), (64, 64), (192, 200), (130, 96)])
def test_packing(shape, torch_only):
    codes = torch.randint(16, shape, dtype=torch.uint8)
    packed = pack_bits(codes, 4)
    assert torch.equal(packed, torch_only(pack_bits, codes, 4)) and torch.equal(unpack_bits(packed, 4, shape[1]), codes)
    if shape[0] >= 64 and shape[0] % 16 == 0 and int4_blocks.block_rows() == 64:
        blocks = int4_blocks.pack(codes)
        assert torch.equal(blocks, torch_only(int4_blocks.pack, codes)) and torch.equal(int4_blocks.unpack(blocks), codes)
