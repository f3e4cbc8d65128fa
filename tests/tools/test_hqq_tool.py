"""hqq's layers compute with the values that its adapter reads out of them; its groups never leave their row."""

import subprocess

import pytest
import torch

from qlib.errors import UserError
from qlib.quantize.tool import Options
from qlib.tools.environments import environment_of
from qlib.tools.run import run_tool

STATE = environment_of("hqq").state
pytestmark = [
    pytest.mark.tools,
    pytest.mark.skipif(STATE != "installed", reason=f"hqq is {STATE}: run `qlib tools install hqq`"),
]
IDS = torch.ones(1, 8, dtype=torch.int64)
#: Run in its environment. Its layers compute in fp16, which rounds to 0.05 %.
SAME_VALUES = """
import torch
from torch import nn
from qlib.quantize.tool import Options
from qlib.tools.adapters import hqq

torch.manual_seed(0)
x = torch.randn(16, 256)
for bits in (2, 3, 4, 8):
    linear = nn.Linear(256, 96)
    exact, bias = linear.weight.detach().clone(), linear.bias.detach().clone()
    layer = hqq._layer(linear, hqq._config(Options("hqq", bits, 64)), torch.float16)
    weight = hqq._values(layer)
    assert max(len(group.unique()) for group in weight.reshape(-1, 64)) <= 2**bits
    assert (weight - exact).norm() / exact.norm() < 1.5 / 2**bits
    wanted = nn.functional.linear(x, weight, bias)
    assert (layer(x.half()).float() - wanted).norm() / wanted.norm() < 2e-3, bits
"""


def test_its_layers_compute_with_the_values_that_are_scored():
    found = subprocess.run([environment_of("hqq").python(), "-c", SAME_VALUES], capture_output=True, text=True)
    assert not found.returncode, found.stderr


@pytest.mark.parametrize("refused", [{"symmetric": True}, {"group_size": 128}])
def test_what_it_does_not_have_is_refused(model_folder, refused):
    folder = model_folder(hidden_size=192, intermediate_size=64)
    options = Options("hqq", **{"group_size": 64} | refused)
    with pytest.raises(UserError, match=f"^hqq: {next(iter(refused))}: "):
        run_tool(options, folder, IDS)
