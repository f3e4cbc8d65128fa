"""The order of int8 codes: against index arithmetic; and their product with many rows: against float64."""

import pytest
import torch
from torch import nn

from qlib.layers import build, int8_tiles, native
from qlib.layers.int8 import Int8Linear
from qlib.quantize.grid import CompressedWeight, Grid


def test_tiles_hold_four_channels_of_64_codes_each():
    codes = torch.randint(-128, 128, (8, 192), dtype=torch.int8)
    tiles = int8_tiles.tile(codes)
    assert tiles.shape == (2, 3, 4, 64) and tiles.is_contiguous()
    for row, column in ((0, 0), (3, 65), (6, 191)):
        assert tiles[row // 4, column // 64, row % 4, column % 64] == codes[row, column]
    assert torch.equal(int8_tiles.untile(tiles), codes)
    ids = torch.tensor([[7, 0], [4, 4]])
    assert torch.equal(int8_tiles.rows(tiles, ids), codes[ids])
    assert torch.equal(int8_tiles.rows(codes, ids), codes[ids]) and int8_tiles.untile(codes) is codes


@pytest.mark.skipif(not native.has_amx(), reason="needs a processor with AMX")
@pytest.mark.parametrize("symmetric", (True, False))
@pytest.mark.parametrize("rows, width, out", ((33, 64, 32), (16, 512, 96), (100, 1088, 544), (520, 1024, 1056)))
def test_many_rows_against_float64(rows, width, out, symmetric):
    """Sums in fp32 are rounded to bf16 once: within half a unit in the last place, and what fp32 sums lose."""
    random = torch.Generator().manual_seed(rows)
    codes = torch.randint(0, 256, (out, width), generator=random, dtype=torch.uint8)
    zeros = torch.full((out, 1), 128, dtype=torch.uint8)
    if not symmetric:
        zeros.random_(256, generator=random)
    scales = (0.01 * torch.rand(out, 1, generator=random)).bfloat16()
    compressed = CompressedWeight(Grid(bits=8, group_size=None, symmetric=symmetric), codes, scales, zeros)
    bias = torch.randn(out, generator=random).bfloat16()
    x = torch.randn(rows, width, generator=random).bfloat16()
    layer = Int8Linear(compressed, nn.Parameter(bias, requires_grad=False))
    assert layer.kernel(rows).endswith("(AMX, own kernel)") or rows <= layer.packed_rows_tiled
    exact = x.double() @ ((codes.double() - zeros.double()) * scales.double()).t() + bias.double()
    magnitude = x.double().abs() @ (codes.double() * scales.double()).t()  # of the largest terms that cancel
    assert ((layer.expand_multiply(x).double() - exact).abs() <= exact.abs() * 2**-8 + magnitude * 2**-18).all()


@pytest.mark.skipif(not native.has_amx(), reason="needs a processor with AMX")
def test_tile_registers_take_their_shape_back_after_a_product_released_them():
    """What llama.cpp needs between torch's products; palette 1, all eight tiles of 16 rows of 64 bytes."""
    shape, none = torch.zeros(64, dtype=torch.uint8), torch.zeros(64, dtype=torch.uint8)
    shape[0], shape[16:32:2], shape[48:56] = 1, 64, 16
    kept = torch.ones(64, dtype=torch.uint8)
    build.call("restore_tiles", shape)
    build.call("restore_tiles", none)  # changes nothing
    build.call("keep_tiles", kept)
    assert torch.equal(kept, shape)
    codes = torch.randint(-128, 128, (32, 64), dtype=torch.int8)
    native.int8_dot(torch.randn(32, 64).bfloat16(), int8_tiles.tile(codes), torch.ones(32).bfloat16())
    build.call("keep_tiles", kept)
    assert torch.equal(kept, none)
