"""Codes at their true size come back bit by bit, and a checkpoint that does not fit is refused by name."""

import pytest
import torch

from qlib.errors import UserError
from qlib.layers.storage import from_tensors, pack_bits, packed_width, stored_bytes, to_tensors, unpack_bits
from qlib.quantize import clip
from qlib.quantize.grid import Grid, fit_grid, round_to_grid

BITS = (2, 3, 4, 5, 6, 8)
GRIDS = [Grid(bits, group, symmetric) for bits in BITS for group in (None, 32) for symmetric in (False, True)] + [
    Grid(4, 32, real_zero=True), Grid(3, None, real_zero=True), Grid(8, None, True, "fp8"),
    Grid(8, "tensor", True, "fp8"), Grid(4, 32, True, "mxfp4"), Grid(4, 16, True, "nvfp4"),
]  # fmt: skip


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", (1, 7, 8, 37, 128))
def test_bits_round_trip_at_their_true_size(bits, count):
    codes = torch.randint(2**bits, (5, count), dtype=torch.uint8)
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (5, packed_width(count, bits)) == (5, -(-count * bits // 8))
    assert torch.equal(unpack_bits(packed, bits, count), codes)


def test_the_first_code_lies_in_the_lowest_bits():
    assert pack_bits(torch.tensor([[1, 2]], dtype=torch.uint8), 4).tolist() == [[0x21]]
    assert pack_bits(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 3).tolist() == [[0b11_010_001, 0]]


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name + ("-sym" if grid.symmetric else ""))
@pytest.mark.parametrize("shape", ((11, 96), (1, 32), (7, 37)))
@pytest.mark.parametrize("how", ("none", "mse"))
def test_a_weight_round_trips_through_a_file(grid, shape, how, tmp_path):
    from safetensors.torch import load_file, save_file

    if shape[1] % 32 and isinstance(grid.group_size, int):
        return  # groups do not divide it
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    compressed = round_to_grid(weight, grid, *clip.fit(weight, grid, how))
    save_file(to_tensors(compressed), tmp_path / "weight.safetensors")
    tensors = load_file(tmp_path / "weight.safetensors")
    scales = {"mxfp4": torch.float8_e8m0fnu, "nvfp4": torch.float8_e4m3fn}.get(grid.element, torch.bfloat16)
    assert tensors["scales"].dtype == scales
    back = from_tensors(grid, tensors, shape)
    for name in ("codes", "scales", "zeros"):
        ours, theirs = getattr(compressed, name), getattr(back, name)
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert torch.equal(ours.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8))
    assert torch.equal(back.dequantize(), compressed.dequantize())
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == stored_bytes(grid, *shape)
    assert ("zeros" in tensors) is grid.has_zeros and ("tensor_scale" in tensors) is (grid.element == "nvfp4")
    if grid.group_size == "tensor":
        assert tensors["scales"].shape == (1,)


@pytest.mark.parametrize("bits", BITS)
def test_stored_bytes_agree_with_the_grid(bits):
    grid = Grid(bits, 128)
    assert 8 * stored_bytes(grid, 64, 512) / (64 * 512) == pytest.approx(grid.bits_per_weight(512))


def test_what_does_not_fit_is_refused_by_name():
    grid, weight = Grid(3, 32), torch.randn(8, 64)
    tensors = to_tensors(round_to_grid(weight, grid, *fit_grid(weight, grid)))
    with pytest.raises(UserError, match=r"'codes' of an int3-g32 weight \[8, 96\]"):
        from_tensors(grid, tensors, (8, 96))
    with pytest.raises(UserError, match="'zeros' is missing"):
        from_tensors(grid, {key: tensors[key] for key in ("codes", "scales")}, (8, 64))
    with pytest.raises(UserError, match="torch.float32"):
        from_tensors(grid, tensors | {"scales": tensors["scales"].float()}, (8, 64))
