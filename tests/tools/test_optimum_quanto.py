"""optimum-quanto's kernels compute with the values that its adapter reads out of its tensors."""

import shutil
import subprocess

import pytest

from qlib.tools.environments import environment_of

STATE = environment_of("optimum-quanto").state
pytestmark = [
    pytest.mark.tools,
    pytest.mark.slow,
    pytest.mark.skipif(STATE != "installed", reason=f"it is {STATE}: run `qlib tools install optimum-quanto`"),
]
#: Run in its environment with a folder, a kind, and the rest of the options: kernels in bf16 differ by some 0.5 %.
SAME_VALUES = """
import json, sys
import torch
from qlib.quantize.tool import Options
from qlib.tools.adapter import load_model, put_weights
from qlib.tools.adapters import optimum_quanto

folder, options = sys.argv[1], Options("optimum-quanto", **json.loads(sys.argv[2]))
ids = torch.randint(0, 300, (2, 32), generator=torch.Generator().manual_seed(0))
exact = load_model(folder).float()
with torch.inference_mode():
    assert (optimum_quanto.open_runtime(folder, None)(ids, 32) - exact(input_ids=ids).logits).abs().max() < 1e-3
    put_weights(exact, optimum_quanto.quantize(folder, ids, options).weights)
    wanted = exact(input_ids=ids).logits
runtime = optimum_quanto.open_runtime(folder, options)
assert (runtime(ids, 32) - wanted).norm() / wanted.norm() < 0.02
runtime.prefill(ids[0])
runtime.decode(ids[1, :1])
"""


@pytest.mark.parametrize(
    "options",
    [
        '{"kind": "qint8", "bits": 8, "group_size": null, "symmetric": true}',
        '{"kind": "qint4", "bits": 4}',
        '{"kind": "qint2", "bits": 2}',
    ],
)
def test_its_kernels_compute_with_the_values_that_are_scored(model_folder, options):
    if "qint2" in options and not shutil.which("c++"):
        pytest.skip("its unpacking is compiled: there is no C++ compiler")
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 128}
    folder = model_folder("qwen2", hidden_size=256, intermediate_size=256, **heads)
    python = environment_of("optimum-quanto").python()
    found = subprocess.run([python, "-c", SAME_VALUES, str(folder), options], capture_output=True, text=True)
    assert not found.returncode, found.stderr
