"""2 bits on our own kernel: the layout by brute force, products against float64, and what a layer of it holds."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qlib.layers import int4_blocks, layer_class, native, pack, resident_bytes
from qlib.layers import int2
from qlib.layers.int2 import Int2Linear
from qlib.layers.int4 import Int4Linear
from qlib.quantize.grid import Grid, fit_grid, round_to_grid

GRIDS = [Grid(2, 32), Grid(2, 128, symmetric=True), Grid(2), Grid(2, 64, real_zero=True)]
SHAPES = [(64, 128), (192, 384), (128, 1408)]
RUNS = Int2Linear.fits(Grid(2, 32), 64, 128)
needs_kernel = pytest.mark.skipif(not RUNS, reason=native.missing() or "torch packs int4 in another order here")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def make(grid: Grid, shape: tuple[int, int], bias: bool = True):
    linear = nn.Linear(shape[1], shape[0], bias=bias).bfloat16()
    weight = linear.weight.detach() + 0.01  # not centred, so that zeros matter
    compressed = round_to_grid(weight, grid, *fit_grid(weight, grid))
    return pack(linear, compressed), compressed


def test_a_block_is_what_its_description_says():
    codes = torch.randint(4, (192, 8), dtype=torch.uint8)
    packed = int2.pack(codes)
    assert packed.shape == (192, 2) and int2.pack(codes[:64].repeat(1, 8)).is_contiguous() and torch.equal(int2.unpack(packed), codes)
    blocks = packed.view(3, 8, 16)
    for block in range(3):
        for channel in range(64):
            for column in range(8):
                found = int(blocks[block, column, channel % 16]) >> channel // 16 * 2 & 3
                assert found == codes[64 * block + channel, column]


@needs_kernel
def test_wider_blocks_are_those_of_int4():
    codes = torch.randint(4, (192, 384), dtype=torch.uint8)
    assert torch.equal(native.int2_widen(int2.pack(codes)), int4_blocks.pack(codes + 6))


@needs_kernel
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", (1, 2, 3, 14, 15, 70))
def test_products_are_close_to_float64(grid, shape, rows):
    layer, compressed = make(grid, shape)
    assert type(layer) is Int2Linear
    assert ("packed int2" in layer.kernel(rows)) == (rows <= Int2Linear.packed_rows)
    x = torch.randn(rows, shape[1]).bfloat16() + 0.1
    weight = compressed.dequantize().double()
    wanted = x.double() @ weight.t() + layer.bias.detach().double()
    # the kernels sum code - middle, and correct for the zero afterwards
    size = x.double().abs() @ (weight.abs() + 2 * compressed.scales.double().max()).t()
    assert ((layer(x).double() - wanted).abs() <= 2**-7 * wanted.abs() + 2**-9 * size).all()


@needs_kernel
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_few_rows_are_as_exact_as_fp32(shape):
    """Activations of very different sizes, one of them far larger than all others: none is rounded to 8 bits."""
    codes = torch.randint(4, shape, dtype=torch.uint8)
    both = torch.stack([torch.rand(shape[1] // 64, shape[0]) + 0.5, torch.randn(shape[1] // 64, shape[0])], -1).bfloat16()
    scales, zeros = both.double().repeat_interleave(64, 0).unbind(-1)
    weight = (codes.double() - 2) * scales.t() + zeros.t()
    x = torch.stack([torch.randn(shape[1]), torch.randn(shape[1]).exp2() * 1e-3, torch.ones(shape[1]) * 1e30]).bfloat16()
    x[:, 5] *= 1000
    found = native.int2_rows(x, int2.pack(codes), both)
    wanted, size = x.double() @ weight.t(), x.double().abs() @ (weight.abs() + 2 * scales.t()).t()
    assert ((found.double() - wanted).abs() <= 2**-8 * wanted.abs() + 2**-18 * size).all()
    x[1, 3] = float("inf")
    found = native.int2_rows(x, int2.pack(codes), both)
    assert not found[1].isfinite().any() and found[[0, 2]].isfinite().all()


@needs_kernel
def test_rows_do_not_depend_on_their_neighbours():
    layer, _ = make(Grid(2, 64), (128, 512))
    x = torch.randn(5, 512).bfloat16()
    assert torch.equal(layer(x), torch.cat([layer(one[None]) for one in x]))


@needs_kernel
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)
def test_codes_come_back_from_half_the_bytes(grid):
    layer, compressed = make(grid, (192, 384), bias=False)
    for name in ("codes", "scales", "zeros"):
        assert torch.equal(getattr(layer.compressed(), name), getattr(compressed, name))
    x = torch.randn(3, 384)
    assert torch.equal(layer(x), F.linear(x, compressed.dequantize()))
    assert layer.packed.numel() == 192 * 384 // 4
    assert layer.resident_bytes() == resident_bytes(grid, 192, 384)
    assert layer.resident_bytes() == Int4Linear.expected_bytes(grid, 192, 384) - 192 * 384 // 4


@needs_kernel
def test_channels_that_do_not_fit_the_scratch_at_once(monkeypatch):
    layer, _ = make(Grid(2, 64), (320, 256))
    x = torch.randn(40, 256).bfloat16()
    tiles = layer(x)
    monkeypatch.setattr(native, "has_amx", lambda: False)
    wanted = layer(x)
    assert (tiles - wanted).float().norm() <= 2**-8 * wanted.float().norm()
    monkeypatch.setattr(int2, "SCRATCH_BYTES", 2 * 64 * 256 // 2)
    assert torch.equal(layer(x), wanted)


@needs_kernel
def test_torch_can_compile_the_kernel():
    told = (torch.randn(2, 128).bfloat16(), torch.randint(256, (64, 32), dtype=torch.uint8), torch.rand(2, 64, 2).bfloat16())
    torch.library.opcheck(native.int2_rows, told, test_utils=("test_schema", "test_faketensor"))


def test_other_shapes_and_machines_hold_int4(monkeypatch):
    assert layer_class(Grid(2, 32), 208, 256) is Int4Linear  # the last block would not be full
    assert layer_class(Grid(3, 32), 192, 256) is layer_class(Grid(4, 32), 192, 256) is Int4Linear
    monkeypatch.setattr(native, "missing", lambda: "switched off")
    layer, compressed = make(Grid(2, 32), (192, 256))
    assert type(layer) is Int4Linear and torch.equal(layer.compressed().codes, compressed.codes)


@needs_kernel
@pytest.mark.parametrize("rows", (1, 5, 70))
def test_a_single_block_as_wide_as_it_is_high(rows):
    """Its bytes, `[in, 16]` and `[out, in / 4]` alike, once were a view that the kernel read the wrong way round."""
    layer, compressed = make(Grid(2, 32), (64, 64))
    x = torch.randn(rows, 64).bfloat16()
    wanted = x.float() @ compressed.dequantize().t() + layer.bias.float()
    assert layer.packed.is_contiguous() and (layer(x) - wanted).abs().max() < 0.05
