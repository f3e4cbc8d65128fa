"""What vLLM takes passes, and what it does not is named in a line."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlib.export.vllm_check import parallel_sizes, problems
from qlib.models.save import save
from qlib.quantize.formats import Grid

FP8 = Grid(8, None, True, "fp8")


def by_input(name):
    """One format for linears that read the same input."""
    return Grid(4, 64) if "self_attn" in name else FP8


def part(name):
    return None if name == "mlp.down_proj" else Grid(4, 64, True)


TAKEN = {
    "compressed_tensors": [
        Grid(2, 32), Grid(3, 64), Grid(4, 128, True), Grid(5), Grid(6, 32), Grid(8, 64), FP8,
        Grid(8, None, True, "int", "int8"), Grid(8, "tensor", True, "fp8"), Grid(4, 32, True, "mxfp4"), by_input, part,
    ],
    "gptq": [Grid(4, 64, True), Grid(8, None, True)],
    "dense": [Grid(4, 64)],
}  # fmt: skip


@pytest.mark.parametrize("format_, grid", [(name, grid) for name, grids in TAKEN.items() for grid in grids])
def test_what_vllm_knows_passes(quantized, tmp_path, format_, grid):
    save(quantized(grid), tmp_path / "it", format_)
    assert problems(tmp_path / "it") == []


@pytest.mark.parametrize(
    "format_, grid, words",
    [
        ("gptq", Grid(4, 64), "bits: 4 asymmetric is not allowed in GPTQ"),
        ("gptq", Grid(3, 64, True), "bits: 3 symmetric is not allowed in GPTQ; allowed: 4 or 8, symmetric"),
        ("packed", Grid(4, 64), "quant_method: 'qlib' is unknown to vLLM; allowed: gptq, compressed-tensors"),
        ("compressed_tensors", lambda name: FP8 if name.endswith("k_proj") else Grid(4, 64),
         "self_attn.q_proj: with k_proj, v_proj: must have one format, these have float-quantized 8 bits and"),
        ("compressed_tensors", lambda name: None if name.endswith("up_proj") else Grid(4, 64),
         "mlp.gate_proj: with up_proj: must have one format, these have no format and pack-quantized 4 bits"),
        ("compressed_tensors", Grid(4, 16, True, "nvfp4"), "weight_global_scale differs, vLLM takes the largest"),
    ],
)  # fmt: skip
def test_what_vllm_does_not_know_is_named(quantized, tmp_path, format_, grid, words):
    save(quantized(grid), tmp_path / "it", format_)
    assert any(words in line for line in problems(tmp_path / "it"))


@pytest.mark.parametrize(
    "changes, tensors, words",
    [
        ({"desc_act": True}, {}, "desc_act: true is not allowed; allowed: false"),
        ({"group_size": 16}, {}, "group_size: 16 is not allowed; allowed: -1, 32, 64, 128"),
        ({}, {"g_idx": None}, "model.layers.1.mlp.down_proj.g_idx: is missing"),
        ({}, {"scales": torch.zeros(1, 128).half()}, "scales: is F16 [1, 128]; expected F16/BF16/F32 [4, 128]"),
        ({}, {"qzeros": torch.zeros(4, 16)}, "qzeros: is F32 [4, 16]; expected I32 [4, 16]"),
    ],
)
def test_a_spoilt_checkpoint_is_named(quantized, tmp_path, changes, tensors, words):
    save(quantized(Grid(4, 64, True)), tmp_path, "gptq")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    held = load_file(tmp_path / "model.safetensors")
    held |= {f"model.layers.1.mlp.down_proj.{part}": tensor for part, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in held.items() if tensor is not None}, tmp_path / "model.safetensors")
    assert any(words in line for line in problems(tmp_path))


def test_how_many_cards_it_can_be_split_over(quantized, tmp_path):
    save(quantized(Grid(4, 64)), tmp_path, "compressed_tensors")
    sizes = parallel_sizes(tmp_path)
    assert sizes[1] == sizes[2] == ""
    assert sizes[4] == (
        "model.layers.0.self_attn.o_proj: 32 input channels of a group on each of 4 cards are no multiple of 64"
    )
    assert sizes[8] == "4 heads, 2 of keys, cannot be split over 8 cards"


def test_the_head_is_stored_once_and_nothing_of_this_machine_is_told(quantized, tmp_path):
    subject = quantized(Grid(4, 64, True), tied=True)
    subject.config._name_or_path = "/somewhere/here"
    for format_ in ("gptq", "compressed_tensors", "dense"):
        save(subject, tmp_path / format_, format_)
        assert "lm_head.weight" not in load_file(tmp_path / format_ / "model.safetensors")
        assert "somewhere" not in (tmp_path / format_ / "config.json").read_text()
        assert {"generation_config.json", "tokenizer.json"} <= {file.name for file in (tmp_path / format_).iterdir()}
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())
    assert config["quantization_config"] == json.loads((tmp_path / "gptq" / "quantize_config.json").read_text())
