"""Other programs load streamed checkpoints, shard by shard, in environments of their own: the very weights."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from driver import IDS

from qlib.compress import compress
from qlib.models.load import load
from qlib.stream.run import stream
from qlib.tools.environments import environment_of

pytestmark = pytest.mark.tools
READER = Path(__file__).parents[1] / "export" / "reader.py"
RECIPE = [{"pass": "gptq", "bits": 4, "group_size": 32, "symmetric": True}]


@pytest.mark.parametrize(
    "environment, how, format",
    [
        ("llm-compressor", "transformers", "compressed_tensors"), ("llm-compressor", "transformers", "dense"),
        ("gptqmodel", "gptqmodel", "gptq"),
    ],
)  # fmt: skip
def test_weights_are_those_of_the_model_in_memory(model_folder, tmp_path, environment, how, format):
    if (state := environment_of(environment).state) != "installed":
        pytest.skip(f"{environment} is {state}: run `qlib tools install {environment}`")
    model, target = str(model_folder(shard="60KB")), tmp_path / "found.pt"
    stream(model, RECIPE, tmp_path / "streamed", IDS, format=format)
    assert len(list((tmp_path / "streamed").glob("*.safetensors"))) == 4
    torch.save(torch.arange(20)[None], tmp_path / "ids.pt")
    job = {"how": how, "folder": str(tmp_path / "streamed"), "target": str(target)}
    subprocess.run([environment_of(environment).python(), READER, json.dumps([job])], check=True, capture_output=True)
    found, ours = torch.load(target), compress(load(model), RECIPE, IDS).model
    assert "error" not in found, found["error"]
    assert len(found["weights"]) == 14
    for name, weight in found["weights"].items():
        expected = ours.get_submodule(name).compressed().dequantize()
        assert torch.equal(weight.float(), expected.bfloat16().float() if format == "dense" else expected), name
