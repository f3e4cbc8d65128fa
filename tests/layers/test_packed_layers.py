"""Packed layers compute what `CompressedWeight.dequantize` says, whichever kernel runs, and give the codes back."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qlib.errors import UserError
from qlib.layers import int4_blocks, layer_class, pack, packed_layers, resident_bytes
from qlib.layers.codes import CodesLinear
from qlib.layers.int4 import Int4Linear
from qlib.layers.int8 import Int8Linear
from qlib.quantize.grid import CompressedWeight, Grid, fit_grid, round_to_grid

GRIDS = [
    Grid(4, 128),
    Grid(4, 64, symmetric=True),
    Grid(4, 32),
    Grid(8),
    Grid(8, symmetric=True),
    Grid(8, 128),
    Grid(4),
    Grid(3, 128),
    Grid(2, 64, symmetric=True),
    Grid(5, 32),
    Grid(6),
]
ROWS = (1, 4, 16, 17, 64, 256)
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def make(grid: Grid, out_features: int = 208, in_features: int = 256, bias: bool = True):
    """A packed layer, what it was made of, and the linear: 208 rows end in a block that is not full."""
    linear = nn.Linear(in_features, out_features, bias=bias).bfloat16()
    weight = linear.weight.detach() + 0.01  # not centred, so that zeros matter
    compressed = round_to_grid(weight, grid, *fit_grid(weight, grid))
    return pack(linear, compressed), compressed, linear


def assert_same(first: CompressedWeight, second: CompressedWeight) -> None:
    assert first.grid == second.grid
    for name in ("codes", "scales", "zeros"):
        a, b = getattr(first, name).cpu(), getattr(second, name).cpu()
        assert a.dtype == b.dtype and torch.equal(a, b), name


def assert_close_to_reference(layer, compressed, linear, rows: int, device: str = "cpu") -> None:
    x = torch.randn(rows, layer.in_features).bfloat16() + 0.1
    out = layer(x.to(device)).cpu()
    wanted = x.double() @ compressed.dequantize().double().t()
    wanted += 0 if linear.bias is None else linear.bias.detach().double()
    assert out.dtype == torch.bfloat16
    # A product of bf16 numbers is summed in fp32 and rounded once or twice; weights may be rounded to bf16 before. The
    # kernels sum code - 128 or code - 8 first, and correct for the zero afterwards.
    middle = compressed.grid.levels // 2
    zeros = torch.full_like(compressed.zeros, middle)
    signed = CompressedWeight(compressed.grid, compressed.codes, compressed.scales, zeros)
    summed = torch.maximum(compressed.dequantize().abs(), signed.dequantize().abs())
    size = x.double().abs() @ summed.double().t()
    assert ((out.double() - wanted).abs() <= 2**-7 * wanted.abs() + 2**-9 * size).all()


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid.name}-{'sym' if grid.symmetric else 'asym'}")
@pytest.mark.parametrize("rows", ROWS)
def test_every_kernel_is_close_to_float64(grid, rows):
    layer, compressed, linear = make(grid)
    assert_close_to_reference(layer, compressed, linear, rows)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid.name}-{'sym' if grid.symmetric else 'asym'}")
def test_fp32_is_exact_and_codes_come_back(grid):
    layer, compressed, linear = make(grid)
    x = torch.randn(2, 5, 256)
    assert torch.equal(layer(x), F.linear(x, compressed.dequantize(), linear.bias.float()))
    assert_same(layer.compressed(), compressed)
    assert_same(copy.deepcopy(layer).float().compressed(), compressed)  # casting a model must not touch the scales


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)
def test_state_dict_and_shape_are_those_of_a_linear(grid, tmp_path):
    layer, compressed, linear = make(grid)
    other, *_ = make(grid)
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    other.load_state_dict(torch.load(tmp_path / "layer.pt"))
    assert_same(other.compressed(), compressed)
    x = torch.randn(2, 3, 256).bfloat16()
    assert torch.equal(other(x), layer(x)) and layer(x).shape == (2, 3, 208)
    assert layer.bias is linear.bias


def test_the_grid_chooses_the_class():
    assert isinstance(make(Grid(4, 128))[0], Int4Linear) and isinstance(make(Grid(8))[0], Int8Linear)
    for grid in (Grid(3, 128), Grid(4), Grid(8, 64)):
        assert isinstance(make(grid)[0], CodesLinear)
    assert layer_class(Grid(4, 32), out_features=24, in_features=64) is CodesLinear  # the kernel wants multiples of 16
    assert layer_class(Grid(8), out_features=7, in_features=5) is Int8Linear


ODD = [(Grid(4, 32), (24, 64)), (Grid(8), (7, 5)), (Grid(8), (48, 40)), (Grid(3), (9, 37)), (Grid(4, 32), (16, 32))]


@pytest.mark.parametrize("grid, shape", ODD, ids=str)
def test_odd_shapes(grid, shape):
    for rows in (1, 100):
        assert_close_to_reference(*make(grid, *shape, bias=False), rows)


def test_int4_across_several_chunks_of_blocks(monkeypatch):
    monkeypatch.setattr(int4_blocks, "SCRATCH_BYTES", 1)
    assert_close_to_reference(*make(Grid(4, 128), out_features=64 * 5 + 32), 64)


def test_the_kernel_depends_on_the_number_of_rows():
    for grid in (Grid(4, 128), Grid(8)):
        layer, *_ = make(grid)
        assert "torch _weight_int" in layer.kernel(1) and "matmul" in layer.kernel(256)
    assert "no packed kernel" in make(Grid(3, 128))[0].kernel(1)


def test_without_a_known_layout_the_kernel_does_everything(monkeypatch):
    layer, compressed, linear = make(Grid(4, 128))
    monkeypatch.setattr(int4_blocks, "block_rows", lambda: None)
    assert "not readable here" in layer.kernel(256)
    assert_same(layer.compressed(), compressed)  # read back through the kernel
    assert_close_to_reference(layer, compressed, linear, 256)
    assert torch.equal(int4_blocks.pack(compressed.codes), layer.packed)


def test_this_machine_packs_in_an_order_we_know():
    assert int4_blocks.block_rows() in (16, 32, 64, 128)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid.name}-{'sym' if grid.symmetric else 'asym'}")
def test_resident_bytes_are_what_the_codes_take(grid):
    layer, *_ = make(grid)
    without_bias = layer.resident_bytes() - 208 * 2
    assert without_bias == resident_bytes(grid, 208, 256)
    overhead = 8 * without_bias / (208 * 256) - grid.bits
    assert overhead <= 32 / (grid.group_size or 256) + 0.4  # a scale and a zero per group, no second copy


def test_gradients_reach_the_activations():
    layer, compressed, _ = make(Grid(4, 128), bias=False)
    x = torch.randn(3, 256).bfloat16().requires_grad_()
    layer(x).sum().backward()
    assert torch.allclose(x.grad.float(), compressed.dequantize().sum(0).expand(3, -1), atol=0.05, rtol=0.02)


def test_packed_layers_are_found_by_name_and_wrong_shapes_refused():
    layer, compressed, _ = make(Grid(4, 128))
    assert packed_layers(nn.ModuleDict({"a": layer, "b": nn.Linear(2, 2)})) == {"a": layer}
    with pytest.raises(UserError, match=r"\[208, 256\] does not fit a linear \[208, 128\]"):
        pack(nn.Linear(128, 208), compressed)


def test_a_zero_that_bf16_cannot_hold_is_refused():
    _, compressed, linear = make(Grid(4, 128))
    compressed.scales[3, 1] = float("inf")
    with pytest.raises(UserError, match="a scale is so small or so large"):
        pack(linear, compressed)


@NEEDS_CUDA
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid.name}-{'sym' if grid.symmetric else 'asym'}")
def test_on_cuda(grid):
    layer, compressed, linear = make(grid)
    layer.cuda()
    assert_same(layer.compressed(), compressed)
    for rows in (1, 17, 256):
        assert_close_to_reference(layer, compressed, linear, rows, "cuda")
    x = torch.randn(5, 256, device="cuda")
    exact = F.linear(x, compressed.dequantize().cuda(), linear.bias.float())
    assert torch.equal(layer(x), exact)
    assert_same(layer.cpu().compressed(), compressed)
