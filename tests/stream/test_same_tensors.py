"""What a stream writes is what loading, compressing and saving write: every tensor, bit by bit, and config.json."""

import json

import pytest
import torch
from safetensors import safe_open

from qlib.compress import compress
from qlib.models.load import load
from qlib.models.save import save
from qlib.stream.run import stream

INDEX = "model.safetensors.index.json"
IDS = list(torch.randint(0, 300, (6, 24), generator=torch.Generator().manual_seed(3)).split(4))
RTN = {"pass": "rtn", "bits": 4, "group_size": 32}
SPARSEGPT = {"pass": "sparsegpt", "sparsity": 0.5}
#: What each format holds; what it does not, it refuses: see test_stream_formats.py.
HELD = {
    "gptq": ["rtn", "gptq", "gptq-sequential", "signround", "wanda-rtn", "joint", "hqq", "act-order"],
    "compressed_tensors": ["gptq", "nvfp4", "signround", "joint", "w8a8", "fp8-tensor", "act-order", "keep-ends"],
    "dense": ["gptq", "nvfp4", "wanda", "sparsegpt", "joint", "outliers", "w8a8", "keep-ends"],
}
RECIPES = {
    "rtn": [RTN],
    "gptq": [{"pass": "gptq", "bits": 3, "group_size": 32}],
    "gptq-sequential": [{"pass": "gptq", "bits": 4, "group_size": 32, "true_sequential": True}],
    "nvfp4": [{"pass": "rtn", "element": "nvfp4", "bits": 4, "group_size": 16}],
    "awq-rtn": [{"pass": "awq", "steps": 3}, RTN],
    "signround": [{"pass": "signround", "bits": 2, "group_size": 32, "iterations": 3}],
    "wanda": [{"pass": "wanda", "sparsity": 0.5}],
    "sparsegpt": [SPARSEGPT],
    "wanda-rtn": [{"pass": "wanda", "sparsity": 0.7}, RTN],
    "joint": [{"pass": "joint", "sparsity": 0.5, "bits": 4, "group_size": 32}],
    "outliers": [{"pass": "allocate_sparsity", "spread": 0.1, "far": 3.0}, SPARSEGPT],
    "mxfp4": [{"pass": "rtn", "element": "mxfp4", "bits": 4}],
    "hqq-real": [{"pass": "hqq", "bits": 4, "group_size": 32}],
    "hqq": [{"pass": "hqq", "bits": 4, "group_size": 32, "round_zeros": True}],
    "w8a8": [{"pass": "smooth"}, {"pass": "rtn", "bits": 8, "group_size": None, "symmetric": True, "activations": "int8"}],
    "fp8-tensor": [{"pass": "rtn", "element": "fp8", "bits": 8, "group_size": "tensor"}],
    "act-order": [{"pass": "gptq", "bits": 4, "group_size": 32, "act_order": True, "symmetric": True}],
    "keep-ends": [{"pass": "keep_ends", "budget": 4.0, "low": 3, "high": 5, "group_size": 32}, RTN],
}  # fmt: skip


def tensors_of(folder):
    """Every tensor of a checkpoint by name, as type, shape and bytes."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():
                tensor = opened.get_tensor(name)
                assert name not in found
                found[name] = (tensor.dtype, tuple(tensor.shape), tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found


def assert_same(streamed, model, recipe, saved, format="packed", ids=IDS):
    save(compress(load(model), recipe, ids, seed=5), saved, format)
    expected, found = tensors_of(saved), tensors_of(streamed)
    assert list(sorted(found)) == list(sorted(expected))
    assert not [name for name, told in found.items() if told != expected[name]]
    beside = [{file.name for file in folder.glob("*.json")} - {INDEX, "stream.json"} for folder in (streamed, saved)]
    assert beside[0] == beside[1] and {"config.json", "tokenizer.json"} < beside[0]
    for name in beside[0]:
        assert (streamed / name).read_text() == (saved / name).read_text(), name


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_stream_writes_what_the_whole_model_would_be(model_folder, tmp_path, recipe):
    model = str(model_folder(shard="60KB"))
    stream(model, recipe, tmp_path / "streamed", IDS, seed=5, mapped="gptq" in str(recipe))
    assert_same(tmp_path / "streamed", model, recipe, tmp_path / "saved")


@pytest.mark.parametrize("format, name", [(format, name) for format, names in HELD.items() for name in names])
def test_in_every_format(model_folder, tmp_path, format, name):
    model = str(model_folder(shard="60KB", num_hidden_layers=3, tied=name in ("gptq", "joint")))
    stream(model, RECIPES[name], tmp_path / "streamed", IDS, seed=5, format=format)
    assert_same(tmp_path / "streamed", model, RECIPES[name], tmp_path / "saved", format)
    assert (tmp_path / "streamed" / "quantize_config.json").is_file() == (format == "gptq")


LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALED = {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 64}}
#: Architecture, changes and recipe; the second is written as llama, with the rows of q and k in another order.
GGUF = [
    ("qwen2", {}, "rtn"), ("qwen2", {"head_dim": 32, "tied": True}, "gptq"), ("qwen2", {}, "keep-ends"),
    ("llama", SCALED, "hqq-real"), ("llama", SCALED, "sparsegpt"), ("qwen3", {}, "joint"), ("mistral", {}, "mxfp4"),
]  # fmt: skip


@pytest.mark.parametrize("kind, changes, name", GGUF)
def test_in_one_gguf_file(model_folder, tmp_path, kind, changes, name):
    model = str(model_folder(kind, shard="60KB", **changes))
    stream(model, RECIPES[name], tmp_path / "streamed", IDS, seed=5, format="gguf")
    save(compress(load(model), RECIPES[name], IDS, seed=5), tmp_path / "saved", "gguf")
    assert sorted(file.name for file in (tmp_path / "streamed").iterdir()) == ["model.gguf", "stream.json"]
    assert (tmp_path / "streamed" / "model.gguf").read_bytes() == (tmp_path / "saved" / "model.gguf").read_bytes()


@pytest.mark.parametrize("kind, tied", [("qwen3", True), ("llama", False), ("mistral", True)])
def test_of_every_architecture_tied_or_not(model_folder, tmp_path, kind, tied):
    model = str(model_folder(kind, tied=tied, shard="60KB", num_hidden_layers=3))
    for mapped in (False, True):
        stream(model, RECIPES["awq-rtn"], tmp_path / f"{mapped}", IDS, seed=5, mapped=mapped)
        assert_same(tmp_path / f"{mapped}", model, RECIPES["awq-rtn"], tmp_path / "saved")


def test_the_result_loads(model_folder, tmp_path):
    model = str(model_folder(shard="60KB"))
    stream(model, RECIPES["joint"], tmp_path / "streamed", IDS, seed=5)
    subject, ids = compress(load(model), RECIPES["joint"], IDS, seed=5), torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(load(str(tmp_path / "streamed")).model(ids).logits, subject.model(ids).logits)
    index = json.loads((tmp_path / "streamed" / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == [f"model-{part:05d}-of-00004.safetensors" for part in range(1, 5)]
    assert not (tmp_path / "streamed" / ".stream").exists()
