"""Sizes by arithmetic agree with the tensors of real modules."""

from dataclasses import replace

import pytest
import torch

from qlib.errors import UserError
from qlib.evaluate.footprint import disk_bytes, grid_of, kv_cache_bytes, measure_footprint, narrowed_shape, shape_footprint
from qlib.layers import pack, packed_layers
from qlib.layers.sparse_storage import count_survivors
from qlib.layers.storage import to_tensors
from qlib.models.shapes import Shape, find_shape, layer_config
from qlib.prune.mask import PrunedWeight, mark_pruned, put_pruned
from qlib.quantize.grid import Grid, fit_grid, round_to_grid

TINY = Shape("tiny", 2, 128, 4, 2, 256, 100, head_dim=64)
FORMATS = ("bf16", "int8", "int4-g128", "int4-g64", "int3-g128", "int2-g32", "int4")


def make_model(shape: Shape, format: str) -> torch.nn.Module:
    from transformers import Qwen2ForCausalLM

    model = Qwen2ForCausalLM(layer_config(shape, shape.layers)).bfloat16()
    grid = grid_of(format)
    for block in model.model.layers if grid else ():
        for name in shape.linears:
            linear, (parent, _, leaf) = block.get_submodule(name), name.rpartition(".")
            weight = linear.weight.detach()
            packed = pack(linear, round_to_grid(weight, grid, *fit_grid(weight, grid)))
            setattr(block.get_submodule(parent), leaf, packed)
    return model


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tied", (False, True))
def test_arithmetic_agrees_with_a_real_model(format, tied, tmp_path):
    shape = replace(TINY, tied=tied)
    model = make_model(shape, format)
    model.tie_weights()
    expected, found = shape_footprint(shape, format), measure_footprint(model)
    rotary = sum(buffer.nbytes for name, buffer in model.named_buffers() if "inv_freq" in name)
    assert found["size.resident_bytes"]["value"] == expected["size.resident_bytes"]["value"] + rotary
    for name in ("size.bits_per_weight", "size.bits_per_weight_total"):
        assert found[name]["value"] == pytest.approx(expected[name]["value"])
    tensors = [to_tensors(layer.compressed()).values() for layer in packed_layers(model).values()]
    stored = sum(tensor.nbytes for found in tensors for tensor in found)
    plain = {parameter.data_ptr(): parameter.nbytes for parameter in model.parameters()}
    assert disk_bytes(shape, format) == stored + sum(plain.values())


@pytest.mark.parametrize("format", ("bf16", "int4-g128", "int3-g128"))
def test_zeros_of_a_mask_count_in_memory_and_not_on_disk(format):
    model = make_model(TINY, "bf16")
    for block in model.model.layers:
        for name in TINY.linears:
            linear, (parent, _, leaf) = block.get_submodule(name), name.rpartition(".")
            weight = linear.weight.detach()
            mask = torch.zeros_like(weight, dtype=torch.bool)
            mask[:, ::4] = True
            put_pruned(linear, PrunedWeight(weight, mask))
            if grid := grid_of(format):
                packed = pack(linear, round_to_grid(linear.weight, grid, *fit_grid(linear.weight, grid)))
                mark_pruned(packed)
                setattr(block.get_submodule(parent), leaf, packed)
    stayed = [count_survivors(one) for block in model.model.layers for one in map(block.get_submodule, TINY.linears)]
    share = sum(stayed) / (TINY.layers * TINY.linear_parameters)
    assert 0.15 < share <= 0.25
    found, expected = measure_footprint(model), shape_footprint(TINY, format, share)
    whole = shape_footprint(TINY, format)
    for name in ("size.bits_per_weight", "size.bits_per_weight_total"):
        assert found[name]["value"] == pytest.approx(expected[name]["value"], rel=1e-3)
        assert found[name]["value"] < whole[name]["value"]
    rotary = sum(buffer.nbytes for name, buffer in model.named_buffers() if "inv_freq" in name)
    assert found["size.resident_bytes"]["value"] == whole["size.resident_bytes"]["value"] + rotary


def test_a_second_copy_would_be_seen():
    model = make_model(TINY, "int4-g128")
    before = measure_footprint(model)["size.resident_bytes"]["value"]
    layer = next(iter(packed_layers(model).values()))
    layer.register_buffer("copy", layer.compressed().dequantize())
    assert measure_footprint(model)["size.resident_bytes"]["value"] == before + layer.copy.nbytes


def test_what_width_pruning_keeps_is_part_of_a_format():
    shape = find_shape("qwen-72b")
    own = narrowed_shape(shape, "bf16@0.653")
    assert (own.heads, own.kv_heads, own.ffn) == (42, 42, 16000) and narrowed_shape(shape, "int8") is shape
    assert disk_bytes(shape, "bf16@0.653") == 2 * own.parameters
    assert disk_bytes(shape, "bf16") / disk_bytes(shape, "bf16@0.653") > 1.5
    assert disk_bytes(shape, "int4-g128@0.653") < disk_bytes(shape, "int4-g128") / 1.4
    grouped = narrowed_shape(find_shape("qwen2.5-72b"), "int4-g128@0.75/0.5")
    assert (grouped.heads, grouped.kv_heads, grouped.ffn) == (48, 8, 14848)
    with pytest.raises(UserError, match="keep_heads: 0.001 of 64 would remove every head"):
        narrowed_shape(shape, "bf16@0.001")


def test_a_mix_weighs_its_parts_by_linear():
    shape = find_shape("qwen-72b")
    half = {name: {"int4-g128": 0.5, "int8": 0.5} for name in shape.linears}
    parts = [disk_bytes(shape, format) for format in ("int4-g128", "int8")]
    assert disk_bytes(shape, half) == pytest.approx(sum(parts) / 2)
    some = {name: {"int8" if name == "mlp.down_proj" else "int4-g128": 1.0} for name in shape.linears}
    rows, columns = shape.linears["mlp.down_proj"]
    more = shape.layers * rows * columns * (Grid(8).bits_per_weight(columns) - Grid(4, 128).bits_per_weight(columns)) / 8
    assert disk_bytes(shape, some) - parts[0] == pytest.approx(more)


def test_qwen_72b():
    shape = find_shape("qwen-72b")
    assert disk_bytes(shape, "bf16") == 144_575_840_256
    assert kv_cache_bytes(shape) == 2_621_440
    int4 = shape_footprint(shape, "int4-g128")
    assert int4["size.bits_per_weight"]["value"] == pytest.approx(4 + 20 / 128)
    assert 0.28 < int4["size.disk_bytes"]["value"] / disk_bytes(shape, "bf16") < 0.30


def test_formats_have_names():
    assert grid_of("bf16") is None
    assert grid_of("int4-g128") == Grid(4, 128) and grid_of("int8") == Grid(8)
    assert all(grid_of(grid.name) == grid for grid in (Grid(3, 64), Grid(6), Grid(2, 32)))
    assert all(grid_of(name).name == name for name in ("fp8", "fp8-tensor", "fp8-a8", "fp8-tensor-a8", "mxfp4", "nvfp4", "int8-a8", "int4-g64-z16"))
    for wrong in ("fp9", "int7", "int4-g", "int4g128", "INT4"):
        with pytest.raises(UserError, match=f"format '{wrong}' is unknown"):
            grid_of(wrong)
