"""Neural Compressor: what it stores, and what it says it computes with."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qlib.models.load import load
from qlib.quantize.tool import Options
from qlib.tools.environments import environment_of
from qlib.tools.run import run_tool

pytestmark = [pytest.mark.tools, pytest.mark.slow]


@pytest.mark.parametrize("kind", ["rtn", "gptq"])
@pytest.mark.parametrize("bits", [4, 3])
def test_codes_of_a_group(kind, bits, model_folder, tmp_path):
    environment = environment_of("neural-compressor")
    if environment.state != "installed":
        pytest.skip(f"neural-compressor is {environment.state}: qlib tools install neural-compressor")
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64}
    folder = model_folder("qwen2", hidden_size=128, intermediate_size=256, **heads)
    ids = torch.from_numpy(np.random.default_rng(1).integers(1, 300, size=(8, 64)))
    options = Options("neural-compressor", kind=kind, bits=bits, group_size=32)
    found = run_tool(options, folder, ids, folder=tmp_path / "work", threads=1)
    exact = load(str(folder)).model
    weights = load_file(found.weights)
    assert len(weights) == 14
    for name, weight in weights.items():
        before = exact.get_parameter(name).float()
        assert max(len(group.unique()) for group in weight.reshape(-1, 32)) <= 2**bits, name
        assert (weight - before).norm() / before.norm() < 0.3, name
    words = 32 / (32 // bits)  # bits of a code: of three bits there are ten in a word
    assert found.bits_per_weight == pytest.approx(words + (16 + words) / 32, abs=0.1)
