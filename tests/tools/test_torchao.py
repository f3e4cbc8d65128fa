"""torchao's formats: how many values, how many bits, and that its own kernels compute with these values."""

import json
import os
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlib.errors import UserError
from qlib.quantize.tool import Options
from qlib.tools.environments import environment_of
from qlib.tools.run import run_tool

pytestmark = [
    pytest.mark.tools,
    pytest.mark.slow,
    pytest.mark.skipif(environment_of("torchao").state != "installed", reason="qlib tools install torchao"),
]
IDS = torch.arange(1, 65).reshape(2, 32)
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64}
SHAPE = {"hidden_size": 128, "intermediate_size": 256} | HEADS
#: Runs in the tool's environment: the compressed model in its kernels, and an ordinary one with its values.
INSIDE = """
import json, sys
import torch
from torch import nn
from qlib.quantize.tool import Options
from qlib.tools.adapter import load_model, put_weights
from qlib.tools.adapters import torchao
torch.set_num_threads(1)
folder, options = sys.argv[1], Options(**json.loads(sys.argv[2]))
ids = torch.arange(1, 33)[None]
found = torchao.quantize(folder, ids, options)
model = load_model(folder)
if found.weights:
    put_weights(model, found.weights)
want = model.float()(input_ids=ids).logits
kernels = found.runtime or torchao.open_runtime(folder, options)
print(json.dumps(float((kernels(ids, 32) - want).norm() / want.norm())))
"""


@pytest.mark.parametrize(
    "options, bits",
    [
        ({"kind": "int8", "bits": 8, "group_size": None, "symmetric": True}, 8 + 40 / 128),
        ({"kind": "int4", "bits": 4, "group_size": 32}, 5),
        ({"kind": "int4-hqq", "bits": 4, "group_size": 32}, 5),
        ({"kind": "intx", "bits": 3, "group_size": 32}, 8.75),
        ({"kind": "intx-hqq", "bits": 2, "group_size": 32, "symmetric": True}, 8.75),
    ],
)
def test_values_of_each_format(options, bits, model_folder, tmp_path):
    options = Options("torchao", **options)
    found = run_tool(options, model_folder("qwen2", **SHAPE), IDS, folder=tmp_path / "work", threads=1)
    weights = load_file(found.weights)
    assert len(weights) == 14 and found.bits_per_weight == pytest.approx(bits, abs=0.2 if options.bits == 8 else 1e-6)
    for name, weight in weights.items():
        groups = weight.reshape(-1, options.group_size or 128)
        assert max(len(group.unique()) for group in groups) <= 2**options.bits, name


@pytest.mark.parametrize(
    "options, most",
    [
        ({"kind": "int4", "bits": 4, "group_size": 32}, 0.02),  # bf16
        ({"kind": "intx", "bits": 3, "group_size": 32}, 0.02),
        ({"kind": "int8-dynamic", "bits": 8, "group_size": None, "symmetric": True}, 0.05),  # rounded activations
    ],
)
def test_its_kernels_compute_with_these_values(options, most, model_folder):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1", "CXX": "none"}
    told = json.dumps(asdict(Options("torchao", **options)))
    command = [str(environment_of("torchao").python()), "-c", INSIDE, str(model_folder("qwen2", **SHAPE)), told]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert 1e-6 < float(found.splitlines()[-1]) < most


def test_groups_that_do_not_fit_are_refused(model_folder):
    options = Options("torchao", kind="int4", bits=4, group_size=128)
    with pytest.raises(UserError, match="group_size: 128 does not divide the 96 inputs"):
        run_tool(options, model_folder(hidden_size=96), IDS, threads=1)
