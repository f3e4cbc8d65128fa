"""Loading: all architectures, and one clear line for everything that can be wrong with a folder."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlib.errors import UserError
from qlib.models.load import load


@pytest.mark.parametrize("kind", ("qwen2", "qwen3", "llama", "mistral"))
@pytest.mark.parametrize("tied", (False, True))
@pytest.mark.parametrize("shard", ("5GB", "60KB"))
def test_logits_equal_those_of_transformers(model_folder, kind, tied, shard):
    from transformers import AutoModelForCausalLM

    folder = model_folder(kind, tied, shard)
    assert (folder / "model.safetensors.index.json").exists() == (shard != "5GB")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)(ids).logits
        assert torch.equal(load(str(folder)).model(ids).logits, expected)


def refused(folder, *words):
    with pytest.raises(UserError) as caught:
        load(str(folder))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_neither_folder_nor_hub_id():
    refused("no such place", "neither 'reference', nor an existing folder, nor a hub id")


def test_no_config(model_folder):
    folder = model_folder()
    (folder / "config.json").unlink()
    refused(folder, "has no config.json")


def test_config_is_not_json(model_folder):
    folder = model_folder()
    (folder / "config.json").write_text("{")
    refused(folder, "config.json", "is not JSON")


def test_unsupported_architecture(model_folder):
    folder = model_folder()
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "qwen22"}
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, "model_type: 'qwen22' is not supported", "did you mean 'qwen2'", "llama")


def test_pickled_weights_only(model_folder):
    folder = model_folder()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin", "run code", "safetensors")


def test_no_weights(model_folder):
    folder = model_folder()
    (folder / "model.safetensors").unlink()
    refused(folder, "has no *.safetensors file")


def test_no_tokenizer(model_folder):
    folder = model_folder()
    (folder / "tokenizer.json").unlink()
    refused(folder, "has no tokenizer")


def test_truncated_shard(model_folder):
    folder = model_folder(shard="60KB")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    refused(folder, shard.name, "is truncated", "tensor '")


def test_truncated_header(model_folder):
    folder = model_folder()
    shard = folder / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:100])
    refused(folder, "model.safetensors", "is truncated")


def test_missing_shard(model_folder):
    folder = model_folder(shard="60KB")
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    shard = sorted(folder.glob("model-*.safetensors"))[0]
    shard.unlink()
    first, *others = [name for name, file in weight_map.items() if file == shard.name]
    refused(folder, shard.name, f"is missing although the index names it for tensor '{first}' and {len(others)} more")


def change(folder, edit):
    """Rewrite the weights after `edit` changed them."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


NORM = "model.layers.1.mlp.down_proj.weight"


def test_missing_tensor(model_folder):
    folder = model_folder()
    change(folder, lambda tensors: tensors.pop(NORM))
    refused(folder, f"tensor '{NORM}' is missing")


def test_misshaped_tensor(model_folder):
    folder = model_folder()
    change(folder, lambda tensors: tensors.update({NORM: tensors[NORM][:, :-1]}))
    refused(folder, "model.safetensors", NORM, "has shape [64, 127], config.json asks for [64, 128]")


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_values_that_are_not_finite(model_folder, value):
    folder = model_folder()
    change(folder, lambda tensors: tensors[NORM].__setitem__((3, 5), value))
    refused(folder, "model.safetensors", NORM, "not finite")


def test_another_quantization_method(model_folder):
    folder = model_folder()
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "awq"}}
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, "'awq' is not supported", "qlib")


def test_remote_code_is_not_run(model_folder):
    folder = model_folder()
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    config = json.loads((folder / "config.json").read_text()) | {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    assert load(str(folder)).model.config.model_type == "qwen2"
