"""What a format cannot say is refused before a block is solved; and a format is not changed half-way."""

import json

import pytest
import torch
from driver import IDS
from safetensors.torch import load_file, save_file
from test_faults import GPTQ, RTN, refused
from test_resume import hashes

from qlib import cli
from qlib.stream import run
from qlib.stream.run import stream

HQQ = [{"pass": "hqq", "bits": 4, "group_size": 32}]
ENDS = [{"pass": "keep_ends", "budget": 4.0, "low": 3, "high": 5, "group_size": 32}, *RTN]
PRUNED = [{"pass": "magnitude"}]
SPREAD = [{"pass": "allocate_sparsity", "spread": 0.1, "far": 3.0}, {"pass": "wanda"}, RTN[0] | {"bits": 6}]
W8A8 = [{"pass": "rtn", "bits": 8, "group_size": None, "symmetric": True, "activations": "int8"}]


@pytest.mark.parametrize(
    "format, recipe, words",
    [
        ("gptq", HQQ, "gptq: model.layers.0.self_attn.q_proj: int4-g32-z16 is no plain integer format; use compressed_tensors"),
        ("gptq", ENDS, "gptq: all packed layers must have one format, these have int3-g32, int5-g32; use compressed_tensors"),
        ("gptq", W8A8, "int8-a8 is no plain integer format"),
        ("gptq", [{"pass": "rtn", "element": "mxfp4"}], "mxfp4 is no plain integer format"),
        ("gptq", [RTN[0] | {"bits": 5}], "the format knows no codes of 5 bits; allowed: 2, 3, 4, 8"),
        ("gptq", SPREAD, "the format knows no codes of 6 bits"),
        ("gptq", PRUNED, "gptq: no pass of the recipe puts weights on a grid"),
        ("compressed_tensors", PRUNED, "compressed_tensors: no pass of the recipe puts weights on a grid"),
        ("compressed_tensors", HQQ, "compressed_tensors: model.layers.0.self_attn.q_proj: zeros of int4-g32-z16 are no codes"),
        ("gguf", [RTN[0] | {"bits": 8}], "gguf: model.layers.0.self_attn.q_proj: Q8_0 has no zero, which 8 bits"),
        ("gguf", [{"pass": "rtn", "element": "nvfp4"}], "gguf: model.layers.0.self_attn.q_proj: group_size: 16 is no multiple"),
        ("gguf", [{"pass": "rtn", "element": "fp8", "bits": 8, "group_size": None}], "GGUF has no type for fp8"),
        ("gguf", [HQQ[0] | {"bits": 5}], "Q8_0 has no zero, which 5 bits with one for each group need"),
        ("gptk", RTN, "format: 'gptk' is unknown; allowed: packed, dense, gptq, compressed_tensors, gguf"),
    ],
)  # fmt: skip
def test_what_a_format_cannot_say_is_refused_before_anything_runs(model_folder, tmp_path, monkeypatch, format, recipe, words):
    monkeypatch.setattr("qlib.stream.run.compress_block", None)
    monkeypatch.setattr("qlib.stream.blocks.run_block", None)
    assert words in refused(str(model_folder()), recipe, tmp_path / "streamed", IDS, format=format)
    assert not (tmp_path / "streamed").exists()


def test_widths_that_do_not_fill_words(model_folder, tmp_path):
    model = str(model_folder(intermediate_size=80))
    recipe = [{"pass": "rtn", "bits": 4, "group_size": None}]
    told = refused(model, recipe, tmp_path / "streamed", format="gptq")
    assert told.startswith("gptq: model.layers.0.mlp.gate_proj: its 80 output channels are no multiple of 32")
    assert stream(model, recipe, tmp_path / "streamed", format="compressed_tensors").complete


def test_what_llama_cpp_cannot_compute(model_folder, tmp_path):
    yarn = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}
    assert "rope_type 'yarn'" in refused(str(model_folder(**yarn)), RTN, tmp_path / "streamed", format="gguf")
    model = str(model_folder("qwen3", name="biased", attention_bias=True))
    assert "blk.0.attn_output: llama.cpp's qwen3 has no bias there" in refused(model, RTN, tmp_path / "streamed", format="gguf")
    assert not (tmp_path / "streamed").exists()


def test_an_interrupted_gguf_file_goes_on(model_folder, tmp_path, monkeypatch):
    model, output = str(model_folder()), tmp_path / "streamed"
    stream(model, RTN, tmp_path / "whole", format="gguf")
    with monkeypatch.context() as changed:
        changed.setattr("qlib.stream.run._compress_one", fail_from(1))
        with pytest.raises(KeyboardInterrupt):
            stream(model, RTN, output, format="gguf")
    parts = sorted(output.rglob("*.safetensors"))
    assert len(parts) == 2
    times = [part.stat().st_mtime_ns for part in parts]
    with monkeypatch.context() as changed:
        changed.setattr("qlib.stream.gguf._append", lambda file, data: file.write(bytes(10)) and interrupt())
        with pytest.raises(KeyboardInterrupt):
            stream(model, RTN, output, format="gguf")
    assert [part.stat().st_mtime_ns for part in parts] == times and not (output / "model.gguf").exists()
    with monkeypatch.context() as changed:
        changed.setattr("shutil.rmtree", lambda folder: interrupt())
        with pytest.raises(KeyboardInterrupt):
            stream(model, RTN, output, format="gguf")
    stream(model, RTN, output, format="gguf")
    assert hashes(output) == hashes(tmp_path / "whole")
    (output / "model.gguf").write_bytes(b"")
    assert "model.gguf: has 0 bytes" in refused(model, RTN, output, format="gguf")


def interrupt():
    raise KeyboardInterrupt


def fail_from(block):
    compress_one = run._compress_one
    return lambda index, *told: compress_one(index, *told) if index < block else interrupt()


def test_scales_that_fp16_cannot_hold_are_found_before_the_first_block(model_folder, tmp_path):
    model, name = model_folder(shard="60KB", num_hidden_layers=3), "model.layers.2.mlp.up_proj.weight"
    file = model / json.loads((model / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(file)
    tensors[name][5, 32:64] = 1.1e-6 * torch.arange(32)
    save_file(tensors, file, {"format": "pt"})
    for format in ("gptq", "gguf"):
        told = refused(str(model), GPTQ, tmp_path / "streamed", IDS, format=format)
        assert told.startswith(f"{file}: tensor '{name}' needs a scale of 2.28e-06, which fp16")
    assert not (tmp_path / "streamed").exists()
    assert stream(str(model), GPTQ, tmp_path / "streamed", IDS, format="compressed_tensors").complete


def test_scales_that_solving_makes_too_small_name_their_linear(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("qlib.stream.run.check_scales", lambda *told: None)
    model = model_folder()
    file = model / "model.safetensors"
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(load_file(file) | {name: torch.full((128, 64), 1.1e-6, dtype=torch.bfloat16)}, file, {"format": "pt"})
    told = refused(str(model), RTN, tmp_path / "streamed", format="gptq")
    assert told.startswith("model.layers.1.mlp.up_proj: gptq: a scale is too small")
    assert len(list((tmp_path / "streamed").glob("model-*"))) == 2


def test_another_format_is_another_stream(model_folder, tmp_path, capsys):
    model, output = str(model_folder()), tmp_path / "streamed"
    stream(model, RTN, output, format="gptq")
    before = hashes(output)
    assert 'format: "gptq" -> "dense"' in refused(model, RTN, output, format="dense")
    told = ["stream", "rtn-int4", "--model", model, "--output", str(output), "-p", "recipe.0.group_size=32"]
    assert cli.main(told) == 2 and 'format: "gptq" -> "packed"' in capsys.readouterr().err
    assert cli.main([*told, "--format", "gptq"]) == 0 and hashes(output) == before
    assert "vLLM 0.33.0: would refuse it:" in capsys.readouterr().out  # zeros: symmetric grids alone are taken
