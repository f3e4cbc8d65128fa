"""ONNX Runtime computes what the values of its weights say, and what transformers computes where nothing is rounded."""

import json
import subprocess

import pytest

from qlib.tools.environments import environment_of

STATE = environment_of("onnxruntime").state
pytestmark = [
    pytest.mark.tools,
    pytest.mark.skipif(STATE != "installed", reason=f"onnxruntime is {STATE}: run `qlib tools install onnxruntime`"),
]

CODE = """
import json
import sys
import tempfile
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from qlib.quantize.tool import Options
from qlib.tools import onnx_graph, onnx_pack
from qlib.tools.adapter import put_weights
from qlib.tools.onnx_session import OnnxRuntime

torch.manual_seed(0)
shape = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}


def check(kind, bits, group, symmetric, tied):
    torch.manual_seed(0)
    config = Qwen2Config(**shape, num_hidden_layers=2, vocab_size=40, max_position_embeddings=400, tie_word_embeddings=tied)
    model, pack = Qwen2ForCausalLM(config).eval(), None
    torch.nn.init.normal_(model.model.layers[0].self_attn.q_proj.bias)
    if kind:
        told = {"bits": bits, "group_size": group, "symmetric": symmetric, "kind": kind}
        pack = onnx_pack.Packer(Options(name="onnxruntime", **told), 0, keep=True)
    with tempfile.TemporaryDirectory() as place:
        runtime = OnnxRuntime(onnx_graph.build(model, Path(place), pack), config)
    if pack:
        put_weights(model, pack.weights)
        assert len(pack.weights) == 14
    ids = torch.randint(0, 40, (2, 20))
    with torch.inference_mode():
        wanted = model(input_ids=ids).logits
    assert torch.allclose(runtime(ids, 20), wanted, atol=1e-4)
    assert torch.allclose(runtime(ids, 3), wanted[:, -3:], atol=1e-4)
    bound, session = [], runtime.session

    class Watched:
        io_binding = session.io_binding

        def run_with_iobinding(self, binding):
            session.run_with_iobinding(binding)
            bound.append(torch.from_numpy(binding.copy_outputs_to_cpu()[-1])[0, -1])

    runtime.session = Watched()
    for row in range(2):  # the cache is forgotten, and moves to a larger place
        runtime.prefill(ids[row, :5])
        runtime.room -= 120
        for at in range(5, 20):
            runtime.decode(ids[row, at : at + 1])
            assert torch.allclose(bound[-1], wanted[row, at], atol=1e-4), at


for case in json.loads(sys.argv[1]):
    print(case, flush=True)
    check(*case)
"""


#: Kind, bits, block, symmetric, tied embeddings. 96 channels do not fill two blocks of 64; k_quant stores its codes as
#: `rtn` does, but cannot store an odd number of blocks, and 96 channels have three.
CASES = [
    (None, 0, 0, False, True),
    (None, 0, 0, False, False),
    ("rtn", 8, 32, True, True),
    ("rtn", 8, 32, False, False),
    ("rtn", 4, 32, False, True),
    ("rtn", 4, 32, True, True),
    ("rtn", 4, 64, False, True),
    ("rtn", 2, 32, False, True),
    ("hqq", 4, 32, False, True),
    ("hqq", 2, 32, False, True),
]


def test_the_values_are_those_it_computes_with():
    """In one process, because importing takes longer than all the rest."""
    python = environment_of("onnxruntime").python()
    done = subprocess.run([str(python), "-c", CODE, json.dumps(CASES)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
