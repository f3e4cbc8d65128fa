"""Packed layers compute what `CompressedWeight.dequantize` says, whichever kernel runs, and give the codes back."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from qlib.errors import UserError
from qlib.layers import gpu, int4_blocks, int8_tiles, layer_class, native, pack, packed_layers, resident_bytes
from qlib.layers.base import round_tokens
from qlib.layers.codes import CodesLinear
from qlib.layers.int4 import Int4Linear
from qlib.layers.int8 import Int8DynamicLinear, Int8Linear
from qlib.quantize.grid import CompressedWeight, Grid, fit_grid, round_to_grid

W8A8 = Grid(8, symmetric=True, activations="int8")
FP8 = Grid(8, symmetric=True, element="fp8", activations="fp8")
GRIDS = [
    Grid(4, 128),
    Grid(4, 64, symmetric=True),
    Grid(4, 32),
    Grid(4, 64, real_zero=True),
    Grid(8),
    Grid(8, symmetric=True),
    Grid(8, 128),
    W8A8,
    Grid(4),
    Grid(3, 128),
    Grid(2, 64, symmetric=True),
    Grid(5, 32),
    Grid(6),
    Grid(3, 64, real_zero=True),
    Grid(4, 32, symmetric=True, element="mxfp4"),
    FP8,
    Grid(8, "tensor", symmetric=True, element="fp8", activations="fp8"),
]
ROWS = (1, 4, 16, 17, 64, 256)
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=["own kernels", "torch only"])
def kernels(request, monkeypatch):
    """Both ways a machine can be; where there is no compiler, one of them."""
    if request.param == "torch only":
        monkeypatch.setattr(native, "missing", lambda: "switched off")
    elif native.missing():
        pytest.skip(native.missing())
    return request.param


def words(grid: Grid) -> str:
    return f"{grid.name}-{'sym' if grid.symmetric else 'asym'}"


def rounded(grid: Grid, weight: torch.Tensor) -> CompressedWeight:
    return round_to_grid(weight, grid, *fit_grid(weight, grid))


def make(grid: Grid, out_features: int = 208, in_features: int = 256, bias: bool = True):
    """A packed layer, what it was made of, and the linear: 208 rows end in a block that is not full."""
    linear = nn.Linear(in_features, out_features, bias=bias).bfloat16()
    weight = linear.weight.detach() + 0.01  # not centred, so that zeros matter
    compressed = rounded(grid, weight)
    return pack(linear, compressed), compressed, linear


def assert_same(first: CompressedWeight, second: CompressedWeight) -> None:
    assert first.grid == second.grid
    for name in ("codes", "scales", "zeros"):
        a, b = getattr(first, name).cpu(), getattr(second, name).cpu()
        assert a.dtype == b.dtype and torch.equal(a.float(), b.float()), name


def assert_close_to_reference(layer, compressed, linear, rows: int, device: str = "cpu") -> None:
    x = torch.randn(rows, layer.in_features).bfloat16() + 0.1
    out = layer(x.to(device)).cpu()
    if layer.grid.activations:
        codes, scales = round_tokens(x, layer.grid.activations)
        x = codes.double() * scales.double()
    wanted = x.double() @ compressed.dequantize().double().t()
    wanted += 0 if linear.bias is None else linear.bias.detach().double().cpu()
    assert out.dtype == torch.bfloat16
    # A product of bf16 numbers is summed in fp32 and rounded once or twice; weights may be rounded to bf16 before. The
    # kernels sum code - middle first, and correct for the zero afterwards.
    summed = compressed.dequantize().abs()
    if compressed.grid.element == "int":
        zeros = torch.full_like(compressed.zeros, compressed.grid.levels // 2)
        signed = CompressedWeight(compressed.grid, compressed.codes, compressed.scales, zeros)
        summed = torch.maximum(summed, signed.dequantize().abs())
    size = x.double().abs() @ summed.double().t()
    assert ((out.double() - wanted).abs() <= 2**-7 * wanted.abs() + 2**-9 * size).all()


@pytest.mark.parametrize("grid", GRIDS, ids=words)
@pytest.mark.parametrize("rows", ROWS)
def test_every_kernel_is_close_to_float64(grid, rows, kernels):
    layer, compressed, linear = make(grid)
    assert_close_to_reference(layer, compressed, linear, rows)


@pytest.mark.parametrize("grid", GRIDS, ids=words)
def test_fp32_is_exact_and_codes_come_back(grid):
    layer, compressed, linear = make(grid)
    x = torch.randn(2, 5, 256)
    codes, scales = round_tokens(x, grid.activations or "int8")
    seen = x + (codes * scales - x) if grid.activations else x
    assert torch.equal(layer(x), F.linear(seen, compressed.dequantize(), linear.bias.float()))
    assert_same(layer.compressed(), compressed)
    assert_same(copy.deepcopy(layer).float().compressed(), compressed)  # casting a model must not touch the scales


def test_rounded_activations_are_within_half_a_step_and_pass_gradients():
    x = torch.randn(7, 96) * torch.logspace(-3, 3, 7)[:, None]
    x[3] = 0
    codes, scales = round_tokens(x)
    assert torch.equal(codes, codes.round()) and codes.abs().max() == 127
    assert torch.allclose(scales[:, 0] * 127, x.abs().amax(1).where(x.abs().amax(1) > 0, torch.tensor(127.0)))
    assert ((codes * scales - x).abs() <= scales / 2 * (1 + 1e-5)).all()
    layer, compressed, _ = make(W8A8, bias=False)
    x = torch.randn(3, 256, requires_grad=True)
    layer(x).sum().backward()
    assert torch.allclose(x.grad, compressed.dequantize().sum(0).expand(3, -1), atol=1e-4)


@pytest.mark.parametrize("out_features", (68, 96))  # 96: with tile registers, where the processor has them
@pytest.mark.parametrize("rows", (1, 5, 300))
def test_integers_are_summed_exactly_at_the_ends_of_their_range(rows, out_features, kernels):
    """Against int64: no saturation, whatever the signs, and the scales multiply in fp32."""
    in_features = 4160  # more than one stretch of input channels, and part of a vector
    x = torch.tensor([1.0, -1.0])[torch.randint(2, (rows, in_features))].bfloat16() * 254  # every code is +-127
    codes = torch.randint(2, (out_features, in_features), dtype=torch.uint8) * 255
    codes[0], codes[1] = 0, 255  # -128 and 127
    x[0] = 254
    scales = (torch.rand(out_features, 1) + 0.5).bfloat16()
    zeros = torch.full((out_features, 1), 128, dtype=torch.uint8)
    bias = nn.Parameter(torch.randn(out_features).bfloat16(), requires_grad=False)
    layer = Int8DynamicLinear(CompressedWeight(W8A8, codes, scales, zeros), bias)
    assert ("own kernel)" in layer.kernel(rows)) == (kernels == "own kernels")
    sums = (x.long() // 2) @ (codes.long() - 128).t()
    assert sums.abs().max() > 2**26 - 2**24
    wanted = sums.double() * 2 * scales.double().t() + bias.double()
    assert torch.allclose(layer(x).double(), wanted, rtol=2**-8, atol=2**-8)


@pytest.mark.skipif(not native.has_amx(), reason="needs a processor with AMX")
@pytest.mark.parametrize("rows, in_features, out_features", ((9, 64, 32), (33, 1088, 64), (257, 2112, 96), (600, 128, 32)))
@pytest.mark.parametrize("bias", (False, True))
def test_tile_registers_and_vectors_give_the_same_bits(rows, in_features, out_features, bias, monkeypatch):
    x = (torch.randn(rows, in_features) * torch.logspace(-3, 3, rows)[:, None]).bfloat16()
    codes = int8_tiles.tile(torch.randint(-128, 128, (out_features, in_features), dtype=torch.int8))
    scales = (torch.rand(out_features) + 0.5).bfloat16()
    told = (x, codes, scales, torch.randn(out_features).bfloat16() if bias else None)
    tiled = native.int8_dot(*told)
    monkeypatch.setattr(native, "has_amx", lambda: False)
    assert torch.equal(tiled, native.int8_dot(*told))


@pytest.mark.skipif(bool(native.missing()), reason=native.missing())
@pytest.mark.parametrize("in_features, groups", ((896, 1), (8192 + 4160, 1), (3 * 576, 3), (2 * 544, 2), (512, 4), (64, 1)))
def test_one_row_of_weight_only_int8_is_as_exact_as_fp32(in_features, groups):
    """Activations of very different sizes, one of them far larger than all others: none is rounded to 8 bits."""
    codes = torch.randint(-128, 128, (12, in_features), dtype=torch.int8)
    codes[0], codes[1] = -128, 127
    scales, offsets = (torch.rand(12, groups) + 0.5).bfloat16(), torch.randn(12, groups)
    for x in (torch.randn(in_features), torch.randn(in_features).exp2() * 1e-3, torch.ones(in_features) * 1e30):
        x = x.bfloat16()
        x[5] *= 1000
        found = native.int8_rows(x[None], int8_tiles.tile(codes), scales, offsets)[0].double()
        weight = codes.double().unflatten(1, (groups, -1)) * scales[..., None].double() + offsets[..., None].double()
        wanted, size = weight.flatten(1) @ x.double(), weight.flatten(1).abs() @ x.double().abs()
        assert ((found - wanted).abs() <= 2**-8 * wanted.abs() + 2**-19 * size).all()
    x[3] = float("inf")
    assert not native.int8_rows(x[None], int8_tiles.tile(codes), scales).isfinite().any()
    assert (native.int8_rows(torch.zeros_like(x[None]), int8_tiles.tile(codes), scales) == 0).all()


@pytest.mark.skipif(bool(native.missing()), reason=native.missing())
def test_own_kernels_round_activations_bit_by_bit_like_the_exact_path():
    x = (torch.randn(33, 200) * torch.logspace(-4, 4, 33)[:, None]).bfloat16()
    x[5] = 0
    codes, scales, sums = native.round_rows(x)
    wanted, wanted_scales = round_tokens(x)
    assert torch.equal(codes.float(), wanted) and torch.equal(scales, wanted_scales[:, 0])
    assert torch.equal(sums, wanted.sum(1).int())


@pytest.mark.skipif(bool(native.missing()), reason=native.missing())
def test_own_kernels_are_operators_that_torch_can_compile():
    x, codes = torch.randn(1, 128).bfloat16(), torch.randint(-128, 128, (64, 128), dtype=torch.int8)
    scales, packed = torch.rand(64, 1).bfloat16(), torch.randint(256, (64, 64), dtype=torch.uint8)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(native.int8_rows, (x, codes, scales), test_utils=checks)
    torch.library.opcheck(native.int8_dot, (x, codes, scales), test_utils=checks)
    torch.library.opcheck(native.int4_row, (x, packed, torch.rand(2, 64, 2).bfloat16()), test_utils=checks)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape_and_grid(data, monkeypatch):
    bits = data.draw(st.sampled_from((2, 3, 4, 5, 6, 8)), "bits")
    group = data.draw(st.sampled_from((None, 32, 64, 96, 128)), "group")
    in_features = data.draw(st.integers(1, 4), "groups") * (group or data.draw(st.integers(1, 70), "in"))
    out_features = data.draw(st.one_of(st.integers(1, 70), st.sampled_from((64, 80, 128, 192))), "out")
    grid = Grid(bits, group, symmetric=data.draw(st.booleans(), "symmetric"))
    if bits == 8 and group is None and data.draw(st.booleans(), "W8A8"):
        grid = W8A8
    if data.draw(st.booleans(), "torch only"):
        monkeypatch.setattr(native, "missing", lambda: "switched off")
    layer, compressed, linear = make(grid, out_features, in_features, data.draw(st.booleans(), "bias"))
    assert_same(layer.compressed(), compressed)
    assert_close_to_reference(layer, compressed, linear, data.draw(st.sampled_from((1, 2, 3, 5, 30, 70)), "rows"))
    monkeypatch.undo()


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
    for grid in (Grid(4, 128), Grid(3, 128), Grid(2, 32), Grid(4), Grid(4, 64, real_zero=True)):
        assert type(make(grid)[0]) is Int4Linear
    for grid in (Grid(8), Grid(8, 64), Grid(5, 32), Grid(6)):
        assert type(make(grid)[0]) is Int8Linear
    assert type(make(W8A8)[0]) is Int8DynamicLinear
    for grid in (Grid(8, real_zero=True), Grid(8, None, True, "fp8"), Grid(4, 32, True, "mxfp4")):
        assert type(make(grid)[0]) is CodesLinear
    assert layer_class(Grid(4, 32), out_features=24, in_features=64) is CodesLinear  # the kernel wants multiples of 16
    assert layer_class(Grid(4), out_features=64, in_features=72) is CodesLinear  # no group of the kernel divides 72
    assert layer_class(Grid(8), out_features=7, in_features=5) is Int8Linear


ODD = [(Grid(4, 32), (24, 64)), (Grid(8), (7, 5)), (Grid(8), (48, 40)), (Grid(3), (9, 37)), (Grid(4, 32), (16, 32))]


@pytest.mark.parametrize("grid, shape", ODD, ids=str)
def test_odd_shapes(grid, shape, kernels):
    for rows in (1, 100):
        assert_close_to_reference(*make(grid, *shape, bias=False), rows)


def test_int4_across_several_chunks_of_blocks(monkeypatch, kernels):
    monkeypatch.setattr(int4_blocks, "SCRATCH_BYTES", 1)
    assert_close_to_reference(*make(Grid(4, 128), out_features=64 * 5 + 32), 70)


def test_the_kernel_depends_on_the_number_of_rows_and_on_the_machine(kernels):
    for grid in (Grid(4, 128), Grid(8)):
        layer, *_ = make(grid, 128)
        assert "matmul" in layer.kernel(256) and "matmul" not in layer.kernel(1)
        assert ("own kernel)" in layer.kernel(1)) == (kernels == "own kernels")
    assert "int8 x int8" in make(W8A8)[0].kernel(1) and "int8 x int8" in make(W8A8)[0].kernel(256)
    assert "no packed kernel" in make(Grid(4, 32, True, "mxfp4"))[0].kernel(1)
    if kernels == "torch only":
        assert "switched off" in make(Grid(8))[0].kernel(1) and "switched off" in make(Grid(4, 128))[0].kernel(256)


def test_without_a_known_layout_the_kernel_does_everything(monkeypatch):
    layer, compressed, linear = make(Grid(4, 128))
    monkeypatch.setattr(int4_blocks, "block_rows", lambda: None)
    assert "not readable here" in layer.kernel(256)
    assert_same(layer.compressed(), compressed)  # read back through the kernel
    assert_close_to_reference(layer, compressed, linear, 256)
    assert torch.equal(int4_blocks.pack(compressed.codes), layer.packed)


def test_this_machine_packs_in_an_order_we_know():
    assert int4_blocks.block_rows() in (16, 32, 64, 128)


@pytest.mark.parametrize("grid", GRIDS, ids=words)
def test_resident_bytes_are_what_the_codes_take(grid):
    layer, *_ = make(grid)
    without_bias = layer.resident_bytes() - 208 * 2
    assert without_bias == resident_bytes(grid, 208, 256)
    held = {Int4Linear: 4, Int8Linear: 8, Int8DynamicLinear: 8}.get(type(layer), grid.bits)
    overhead = 8 * without_bias / (208 * 256) - held
    assert overhead <= 48 / (grid.group_size if isinstance(grid.group_size, int) else 128)  # a scale and a zero per group, no second copy


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


@pytest.mark.parametrize("size", [None, "tensor"])
def test_the_product_of_fp8_numbers_is_close_to_float64(size):
    """On a CPU the layer does not choose it, but torch's operator is there, too."""
    grid = Grid(8, size, symmetric=True, element="fp8", activations="fp8")
    layer, compressed, linear = make(grid)
    layer.expand_multiply = layer.multiply
    for rows in (1, 17, 64):
        assert_close_to_reference(layer, compressed, linear, rows)


def test_tokens_are_rounded_to_the_nearest_e4m3_number():
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    numbers = numbers[numbers.isfinite()]
    x = torch.randn(5, 300) * torch.logspace(-3, 3, 5)[:, None]
    x[2] = 0
    codes, scales = round_tokens(x, "fp8")
    steps = x.double() / scales.double()
    nearest = (steps[..., None] - numbers).abs().amin(-1)
    assert torch.allclose((steps - codes.double()).abs(), nearest, atol=1e-4)  # a tie may fall to either side
    assert codes.abs().amax(1).tolist() == [448, 448, 0, 448, 448]


@NEEDS_CUDA
@pytest.mark.parametrize("element", ["int8", "fp8"])
def test_tokens_are_rounded_on_cuda_as_on_a_cpu(element):
    x = torch.randn(7, 1000).bfloat16() * torch.logspace(-3, 3, 7)[:, None].bfloat16()
    x[3] = 0
    codes, scales = gpu.round_tokens(x.cuda(), element)
    wanted, wanted_scales = round_tokens(x, element)
    assert torch.equal(codes.float().cpu(), wanted) and torch.equal(scales.cpu(), wanted_scales)


@NEEDS_CUDA
@pytest.mark.parametrize("grid", [Grid(8), Grid(8, symmetric=True), Grid(8, 128), Grid(4, 128), Grid(3, 32)], ids=words)
@pytest.mark.parametrize("in_features", [384, 640, 896])  # of int4 slices of 16, 16 and 16; tests above have 32
def test_on_cuda_for_odd_shapes(grid, in_features):
    layer, compressed, linear = make(grid, 208, in_features)
    layer.cuda()
    for rows in (1, 33, 700):
        assert_close_to_reference(layer, compressed, linear, rows, "cuda")


@NEEDS_CUDA
def test_int4_on_cuda_without_our_kernels(monkeypatch):
    monkeypatch.setattr(gpu, "_load", lambda: (None, "switched off"))
    layer, compressed, linear = make(Grid(4, 128))
    layer.cuda()
    for rows in (1, 17):
        assert_close_to_reference(layer, compressed, linear, rows, "cuda")
    assert_same(layer.compressed(), compressed)


@NEEDS_CUDA
@pytest.mark.parametrize("grid", GRIDS, ids=words)
def test_on_cuda(grid):
    layer, compressed, linear = make(grid)
    layer.cuda()
    assert_same(layer.compressed(), compressed)
    for rows in (1, 17, 100, 600):
        assert_close_to_reference(layer, compressed, linear, rows, "cuda")
    x = torch.randn(5, 256, device="cuda")
    codes, scales = round_tokens(x, grid.activations or "int8")
    seen = x + (codes * scales - x) if grid.activations else x
    exact = F.linear(seen, compressed.dequantize().cuda(), linear.bias.float())
    assert torch.equal(layer(x), exact)
    assert_same(layer.cpu().compressed(), compressed)


@pytest.mark.parametrize("grid", [*GRIDS, Grid(4, 16, symmetric=True, element="nvfp4")], ids=lambda grid: grid.name)
def test_layers_made_of_parts_of_one_weight_share_no_memory_so_that_they_can_be_saved(tmp_path, grid):
    from safetensors.torch import load_file, save_file

    weight = torch.randn(192, 256)
    whole = round_to_grid(weight, grid, *fit_grid(weight, grid))
    layers = nn.ModuleList(pack(nn.Linear(256, 64), whole.rows(slice(i, i + 64))) for i in (0, 64, 128))
    save_file(layers.state_dict(), tmp_path / "model.safetensors")
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(tensor, layers.state_dict()[name])
    for i, layer in enumerate(layers):
        assert torch.equal(layer.compressed().dequantize(), whole.dequantize()[64 * i : 64 * i + 64])
