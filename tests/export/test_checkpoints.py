"""Tensors of GPTQ and compressed-tensors checkpoints, unpacked by other code than ours."""

import sys
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings, strategies as st

from qlib.errors import UserError
from qlib.export import compressed_tensors, gptq
from qlib.layers import pack
from qlib.quantize.formats import Grid
from qlib.quantize.grid import CompressedWeight, fit_grid, round_to_grid


def compress(grid: Grid, rows: int = 64, columns: int = 128, seed: int = 0) -> CompressedWeight:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return round_to_grid(weight, grid, *fit_grid(weight, grid))


def packed(grid: Grid, **size):
    compressed = compress(grid, **size)
    linear = torch.nn.Linear(compressed.codes.shape[1], len(compressed.codes), bias=False)
    return pack(linear, compressed)


def read_stream(words: torch.Tensor, bits: int, count: int) -> list[int]:
    """Codes out of 32-bit words, by arithmetic on one large Python number."""
    number = sum((int(word) & 0xFFFFFFFF) << (32 * index) for index, word in enumerate(words))
    return [(number >> (bits * index)) & (2**bits - 1) for index in range(count)]


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([2, 3, 4, 8]), st.booleans(), st.sampled_from([32, 64, None]), st.integers(1, 3), st.integers(0, 9))
def test_gptq_words_hold_codes_and_zeros(bits, symmetric, group, blocks, seed):
    compressed = compress(Grid(bits, group, symmetric), 32 * blocks, 64, seed)
    tensors = gptq.layer_tensors(compressed)
    columns = [read_stream(tensors["qweight"][:, out], bits, 64) for out in range(32 * blocks)]
    assert columns == compressed.codes.tolist()
    zeros = [read_stream(row, bits, 32 * blocks) for row in tensors["qzeros"]]
    assert zeros == (compressed.zeros.t() - int(symmetric)).tolist()
    assert tensors["g_idx"].tolist() == [column // (group or 64) for column in range(64)]
    assert torch.equal(tensors["scales"].float(), compressed.scales.t().float())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_auto_gptq_packs_the_same_words(bits):
    """Its own packing of the same codes; zeros of version 1 are those of symmetric grids."""
    compressed = compress(Grid(bits, 64, symmetric=True), 64, 128)
    theirs = auto_gptq_linear()(bits, 64, 128, 64, bias=False)
    linear = torch.nn.Linear(128, 64, bias=False)
    linear.weight.data = compressed.dequantize()
    theirs.pack(linear, compressed.scales.float(), compressed.zeros.float(), g_idx=None)
    ours = gptq.layer_tensors(compressed)
    assert torch.equal(theirs.qweight, ours["qweight"]) and torch.equal(theirs.qzeros, ours["qzeros"])
    assert torch.equal(theirs.scales, ours["scales"])


def auto_gptq_linear():
    spec = find_spec("auto_gptq")
    sys.modules["auto_gptq"] = ModuleType("auto_gptq")  # in place of its __init__, which imports everything
    sys.modules["auto_gptq"].__path__ = list(spec.submodule_search_locations)
    try:
        from auto_gptq.nn_modules.qlinear.qlinear_cuda_old import QuantLinear
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "auto_gptq"]:
            del sys.modules[name]
    return QuantLinear


@pytest.mark.parametrize(
    "grids, others, words",
    [
        ([Grid(4, 64), Grid(8)], [], "gptq: all packed layers must have one format, these have int4-g64, int8"),
        ([Grid(4, 64)], ["lm_head", "a.b"], "gptq: a.b is not packed"),
        ([Grid(6, 64)], [], "knows no codes of 6 bits; allowed: 2, 3, 4, 8"),
        ([Grid(8, None, True, "fp8")], [], "fp8 is no plain integer format"),
    ],
)
def test_gptq_refuses_what_it_cannot_say(grids, others, words):
    with pytest.raises(UserError, match=words):
        gptq.quantization_config({f"layer.{i}": packed(grid) for i, grid in enumerate(grids)}, others)


def test_gptq_refuses_odd_widths():
    with pytest.raises(UserError, match="48 output channels are no multiple of 32"):
        gptq.quantization_config({"a": packed(Grid(4, 64), rows=48)}, [])


def test_gptq_refuses_scales_that_fp16_cannot_hold():
    compressed = compress(Grid(4, 64))
    compressed.scales = compressed.scales * 2.0**-30
    with pytest.raises(UserError, match="too small or too large for fp16"):
        gptq.layer_tensors(compressed)


def test_gptq_says_which_version_of_the_format_it_is():
    versions = [gptq.quantization_config({"a": packed(Grid(4, 64, s))}, ["lm_head"])["checkpoint_format"] for s in (True, False)]
    assert versions == ["gptq", "gptq_v2"]


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([2, 3, 4, 5, 6, 8]), st.booleans(), st.sampled_from([32, None]), st.integers(1, 40), st.integers(0, 9))
def test_compressed_tensors_words_hold_codes_and_zeros(bits, symmetric, group, rows, seed):
    compressed = compress(Grid(bits, group, symmetric), rows, 96, seed)
    tensors = compressed_tensors.layer_tensors(compressed)
    assert [read_stream(row, bits, 96) for row in tensors["weight_packed"]] == compressed.codes.tolist()
    assert ("weight_zero_point" in tensors) != symmetric and tensors["weight_shape"].tolist() == [rows, 96]
    if not symmetric:
        zeros = [read_stream(column, bits, rows) for column in tensors["weight_zero_point"].t()]
        assert zeros == compressed.zeros.t().tolist()


def test_compressed_tensors_floats_and_int8_mean_what_the_weight_means():
    for grid in (Grid(8, None, True, "fp8"), Grid(8, "tensor", True, "fp8")):
        tensors = compressed_tensors.layer_tensors(compressed := compress(grid))
        assert torch.equal(tensors["weight"].float() * tensors["weight_scale"].float(), compressed.dequantize())
    tensors = compressed_tensors.layer_tensors(compressed := compress(Grid(8, None, True, "int", "int8")))
    assert torch.equal(tensors["weight"].float() * tensors["weight_scale"].float(), compressed.dequantize())
    half = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    table = torch.tensor(half + [-value for value in half])
    for grid in (Grid(4, 32, True, "mxfp4"), Grid(4, 16, True, "nvfp4")):
        tensors = compressed_tensors.layer_tensors(compressed := compress(grid))
        codes = torch.stack([tensors["weight_packed"] & 15, tensors["weight_packed"] >> 4], -1).flatten(1)
        scales = tensors["weight_scale"]
        factor = torch.exp2(scales.float() - 127) if grid.element == "mxfp4" else scales.float() / tensors["weight_global_scale"]
        weight = table[codes.long()].unflatten(1, (-1, grid.group_size)) * factor[..., None]
        torch.testing.assert_close(weight.flatten(1), compressed.dequantize(), rtol=1e-6, atol=0)


def test_compressed_tensors_groups_name_their_layers():
    one = compressed_tensors.quantization_config({"m.a": packed(Grid(4, 64))}, ["lm_head"])
    assert one["config_groups"]["group_0"]["targets"] == ["Linear"] and one["ignore"] == ["lm_head"]
    assert one["format"] == "pack-quantized"
    two = compressed_tensors.quantization_config({"m.a": packed(Grid(4, 64)), "m.b": packed(Grid(8, None, True, "fp8"))}, [])
    assert [group["targets"] for group in two["config_groups"].values()] == [["re:^m\\.a$"], ["re:^m\\.b$"]]
    assert two["format"] == "mixed-precision"
    with pytest.raises(UserError, match="zeros of int4-g64-z16 are no codes"):
        compressed_tensors.quantization_config({"m.a": packed(Grid(4, 64, real_zero=True))}, [])
