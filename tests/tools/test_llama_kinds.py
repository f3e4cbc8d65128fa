"""llama.cpp's kinds with superblocks: short rows are folded, nothing falls back, and it computes with what we read back."""

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from qlib.models.load import load
from qlib.quantize.tool import Options
from qlib.tools.about import about
from qlib.tools.environments import environment_of

STATE = environment_of("llama-cpp").state
pytestmark = [
    pytest.mark.tools,
    pytest.mark.slow,
    pytest.mark.skipif(STATE != "installed", reason=f"llama-cpp is {STATE}: run `qlib tools install llama-cpp`"),
]
#: Kind -> types of its mixture, bits of a weight from and to, and how far weights move on average, of their norm.
MIXTURES = {
    "Q4_K_M": ({"Q4_K", "Q6_K"}, (4.5, 5.2), 0.1),
    "Q3_K_M": ({"Q3_K", "Q4_K", "Q5_K"}, (3.6, 4.1), 0.2),
    "Q2_K": ({"Q2_K", "Q3_K"}, (2.8, 3.2), 0.4),
    "IQ3_S": ({"IQ3_S"}, (3.4375, 3.4375), 0.2),
    "IQ2_S": ({"IQ2_XS", "IQ3_S"}, (2.4, 2.9), 0.5),
}
LONG = dict(hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64, intermediate_size=512)
#: Rows of 128 and 384 with more heads than fit the hidden size, written as llama; rows of whole superblocks; one layer of
#: these, because behind a second one activations that were almost the same are rounded to other codes.
SHAPES = {
    "short": dict(hidden_size=128, num_attention_heads=6, num_key_value_heads=2, head_dim=64, intermediate_size=384),
    "long": LONG,
    "one": LONG | {"num_hidden_layers": 1},
}
ROUNDED = 0.01  # of the logits' spread; all rounding of activations is 0.03. A few lie between two codes and fall otherwise
DRIVER = """
import json, sys
from pathlib import Path
import numpy as np, torch
from safetensors.torch import save_file
from qlib.export.gguf import export, importance
from qlib.models.load import load
from qlib.quantize.tool import Options
from qlib.tools.adapter import load_model, put_weights
from qlib.tools.adapters.llama_cpp import open_runtime, quantize
from qlib.tools.llama_quantize import quantize as into_type
from qlib.tools.llama_random import chosen_types, shape_of_config
from qlib.tools.llama_runtime import LlamaRuntime

folder, told, tensors = Path(sys.argv[1]), {}, {}
ids = torch.randint(1, 300, (4, 48), generator=torch.Generator().manual_seed(0))
logits = lambda model: model(input_ids=ids).logits.float()

def round_inputs(module, inputs):  # as llama.cpp does before it multiplies: 8 bits, a scale for 256 of a row
    blocks = inputs[0].unflatten(-1, (-1, 256))
    scales = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return ((blocks / scales).round() * scales).flatten(-2)

for number, options in enumerate(json.loads(sys.argv[2])):
    options = Options("llama-cpp", **options)
    for name in ("short", "long"):
        found = quantize(folder / name, ids, options)
        told[f"{name}.{options.kind}"] = {"bits": found.bits_per_weight, "seen": found.seen} | found.settings
        tensors |= {f"{name}.{options.kind}.{path}": weight.contiguous() for path, weight in found.weights.items()}
    again = quantize(folder / "short", ids, options)
    for path, weight in again.weights.items():
        assert torch.equal(weight, tensors[f"short.{options.kind}.{path}"]), path
    found = quantize(folder / "one", ids, options)
    subject = load(str(folder / "one"))
    exact, packed, matrix = (folder / name for name in ("exact.gguf", "packed.gguf", "matrix.npz"))
    export(subject, exact, dense="f32")
    np.savez(matrix, **importance(subject.model, [ids]))
    into_type(exact, packed, options.kind, matrix, "F32")
    with torch.inference_mode():
        model = load_model(folder / "one").float()
        tensors[f"{options.kind}.dense"] = logits(model)
        put_weights(model, found.weights)
        for path in found.weights:
            model.get_submodule(path).register_forward_pre_hook(round_inputs)
        tensors[f"{options.kind}.ours"] = logits(model)
    tensors[f"{options.kind}.theirs"] = LlamaRuntime(packed, 64, exact=True)(ids, ids.shape[1])
    runtime = open_runtime(folder / "long", options)
    told[f"{options.kind}.random"] = chosen_types(shape_of_config(load(str(folder / "long")).config), options.kind)
    tensors[f"{options.kind}.random"] = runtime(ids, 1)
runtime = open_runtime(folder / "short", None)
with torch.inference_mode():
    tensors["exact.ours"] = logits(load_model(folder / "short").float())
tensors["exact.theirs"] = runtime(ids, ids.shape[1])
runtime.prefill(ids[0, :-1])
runtime.decode(ids[0, -1:])
assert runtime.cached == ids.shape[1]
import llama_cpp
last = np.ctypeslib.as_array(llama_cpp.llama_get_logits(runtime.session.context), (runtime.session.vocab,))
tensors["exact.decoded"] = torch.from_numpy(last.copy())
save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "found.safetensors")
(folder / "told.json").write_text(json.dumps(told))
"""


def options_of(kind):
    told = about("llama-cpp").kinds[kind]
    return {"kind": kind, "bits": told.bits, "group_size": told.group_size, "symmetric": told.symmetric}


@pytest.fixture(scope="module")
def found(tmp_path_factory, tiny_model, tokenizer):
    """Everything from one process of llama.cpp's environment."""
    folder = tmp_path_factory.mktemp("kinds")
    for name, changes in SHAPES.items():
        model = tiny_model("qwen2", tied=True, initializer_range=0.1, **changes)
        with torch.no_grad():  # norms of 1 leave bf16 activations of few bits, many of which lie between two codes
            for module in model.modules():
                if "norm" in type(module).__name__.lower():
                    module.weight.copy_(torch.linspace(0.5, 1.5, len(module.weight)))
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    asked = json.dumps([options_of(kind) for kind in MIXTURES])
    command = [str(environment_of("llama-cpp").python()), "-c", DRIVER, str(folder), asked]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads((folder / "told.json").read_text())
    return SimpleNamespace(folder=folder, told=told, tensors=load_file(folder / "found.safetensors"))


@pytest.mark.parametrize("kind", MIXTURES)
@pytest.mark.parametrize("name", ["short", "long"])
def test_no_linear_falls_back_and_values_are_near(found, name, kind):
    told, (types, (low, high), far) = found.told[f"{name}.{kind}"], MIXTURES[kind]
    assert not told["warnings"] and told["types"].keys() == types | {"F16", "F32"}
    assert low <= told["bits"] <= high
    folded = {"rows of 128", "rows of 384"} if name == "short" else set()
    assert {key for key in told if key.startswith("rows of")} == folded
    for path, linear in load(str(found.folder / name)).model.named_modules():
        if f"{name}.{kind}.{path}" in found.tensors:
            weight, exact = found.tensors[f"{name}.{kind}.{path}"], linear.weight.float()
            assert (weight - exact).norm() < far * exact.norm(), path


@pytest.mark.parametrize("kind", ["Q4_K_M", "Q3_K_M", "Q2_K"])
def test_a_group_has_as_many_values_as_codes(found, kind):
    options = Options("llama-cpp", **options_of(kind))
    for path in ("q_proj", "k_proj"):  # never in a wider type
        weight = found.tensors[f"short.{kind}.model.layers.0.self_attn.{path}"].reshape(-1, options.group_size)
        assert max(len(group.unique()) for group in weight) <= 2**options.bits


@pytest.mark.parametrize("kind", MIXTURES)
def test_it_computes_with_the_values_that_are_read_back(found, kind):
    dense, ours, theirs = (found.tensors[f"{kind}.{name}"] for name in ("dense", "ours", "theirs"))
    distance = (theirs - ours).square().mean().sqrt()
    assert distance < ROUNDED * ours.std() and distance < 0.05 * (ours - dense).square().mean().sqrt()


@pytest.mark.parametrize("kind", MIXTURES)
def test_random_weights_have_the_types_of_quantized_ones(found, kind):
    types = list(found.told[f"{kind}.random"].values())
    assert {name: types.count(name) for name in sorted(set(types))} == found.told[f"long.{kind}"]["types"]
    assert found.tensors[f"{kind}.random"].isfinite().all()


def test_uncompressed_it_computes_the_same_in_fp32(found):
    ours, theirs = found.tensors["exact.ours"], found.tensors["exact.theirs"]
    assert (theirs - ours).abs().max() < 1e-4 * ours.std()
    assert (found.tensors["exact.decoded"] - ours[0, -1]).abs().max() < 1e-4 * ours.std()
