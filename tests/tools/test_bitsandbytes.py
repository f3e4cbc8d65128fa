"""bitsandbytes' formats: how many values, how many bits, and that its kernels compute with these values."""

import json
import os
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlib.quantize.tool import Options
from qlib.tools.environments import environment_of
from qlib.tools.run import run_tool

pytestmark = [
    pytest.mark.tools,
    pytest.mark.slow,
    pytest.mark.skipif(environment_of("bitsandbytes").state != "installed", reason="qlib tools install bitsandbytes"),
]
IDS = torch.arange(1, 65).reshape(2, 32)
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64}
SHAPE = {"hidden_size": 128, "intermediate_size": 256} | HEADS
#: Runs in the tool's environment: the compressed model in its kernels, and an ordinary one with its values.
INSIDE = """
import json, sys
import torch
from qlib.quantize.tool import Options
from qlib.tools.adapter import load_model, put_weights
from qlib.tools.adapters import bitsandbytes
torch.set_num_threads(1)
folder, options = sys.argv[1], Options(**json.loads(sys.argv[2]))
ids = torch.arange(1, 33)[None]
found = bitsandbytes.quantize(folder, ids, options)
model = load_model(folder)
if found.weights:
    put_weights(model, found.weights)
want = model.float()(input_ids=ids).logits
kernels = found.runtime or bitsandbytes.open_runtime(folder, options)
print(json.dumps(float((kernels(ids, 32) - want).norm() / want.norm())))
"""


def options_of(kind: str) -> Options:
    eight = kind == "int8"
    return Options("bitsandbytes", kind=kind, bits=8 if eight else 4, group_size=None if eight else 64, symmetric=True)


@pytest.mark.parametrize("kind, bits", [("nf4", 4.5), ("nf4-double", 4 + 8 / 64 + 32 / (64 * 256)), ("fp4", 4.5)])
def test_values_of_each_format(kind, bits, model_folder, tmp_path):
    folder = model_folder("qwen2", **SHAPE)
    found = run_tool(options_of(kind), folder, IDS, folder=tmp_path / "work", threads=1)
    weights = load_file(found.weights)
    assert len(weights) == 14 and found.bits_per_weight == pytest.approx(bits, abs=2e-3)
    for name, weight in weights.items():
        assert max(len(block.unique()) for block in weight.reshape(-1, 64)) <= 16, name


@pytest.mark.parametrize("kind, most", [("nf4", 0.02), ("nf4-double", 0.02), ("int8", 0.05)])
def test_its_kernels_compute_with_these_values(kind, most, model_folder):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    told = json.dumps(asdict(options_of(kind)))
    command = [str(environment_of("bitsandbytes").python()), "-c", INSIDE, str(model_folder("qwen2", **SHAPE)), told]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert 1e-6 < float(found.splitlines()[-1]) < most
