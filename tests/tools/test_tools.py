"""Each tool that is installed: it quantizes a tiny model, and is scored inside its environment as outside of it."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qlib.errors import UserError
from qlib.evaluate.baseline import answer
from qlib.evaluate.items import build_items, cut_windows
from qlib.models.load import load
from qlib.quantize.tool import Options
from qlib.tools.about import tool_names
from qlib.tools.adapter import put_weights
from qlib.tools.environments import environment_of
from qlib.tools.exam import Exam
from qlib.tools.run import run_tool

pytestmark = [pytest.mark.tools, pytest.mark.slow]
#: Settings in which a tool differs from the others here.
OWN = {"auto-round": {"iterations": 2}, "llama-cpp": {"kind": "IQ4_NL", "bits": 4, "symmetric": True}}


@pytest.fixture(params=sorted(tool_names()))
def tool(request):
    environment = environment_of(request.param)
    if environment.state != "installed":
        pytest.skip(f"{request.param} is {environment.state}: qlib tools install {request.param}")
    return request.param


def make_exam() -> Exam:
    generator = np.random.default_rng(0)
    documents = [generator.integers(1, 300, size=200) for _ in range(4)]
    items = build_items(documents, {"line": None, "any": None, "word": None}, 0, 6)
    return Exam(items, cut_windows(documents, 64), 0, len(documents))


def test_scorer_inside_agrees_with_scorer_outside(tool, model_folder, tmp_path):
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64}
    folder = model_folder("qwen2", hidden_size=128, intermediate_size=256, **heads)
    ids = torch.from_numpy(np.random.default_rng(1).integers(1, 300, size=(8, 64)))
    options, exam = Options(tool, **{"bits": 3, "group_size": 32, "symmetric": False} | OWN.get(tool, {})), make_exam()
    found = run_tool(options, folder, ids, exam, tmp_path / "work", threads=1)
    weights = {name.removesuffix(".weight"): weight for name, weight in load_file(found.weights).items()}
    assert len(weights) == 14 and found.seconds > 0 and found.versions["torch"].startswith("2.13.0")
    assert found.bits_per_weight == options.bits + (16 + options.bits * (not options.symmetric)) / 32
    subject = load(str(folder))
    for name, weight in weights.items():  # at most as many values in a group as it has codes, near what they were
        exact = subject.model.get_submodule(name).weight.float()
        assert max(len(group.unique()) for group in weight.reshape(-1, 32)) <= 2**options.bits, name
        assert (weight - exact).norm() / exact.norm() < 0.3, name
    put_weights(subject.model, weights)
    outside = answer(subject, exam.items, exam.texts, exam.start)
    for name in ("inside", "alone", "nll"):
        np.testing.assert_allclose(getattr(found.answers, name), getattr(outside, name), rtol=2e-5)
    np.testing.assert_array_equal(found.answers.tokens, outside.tokens)


def test_an_error_comes_back_as_one_line(model_folder):
    tool = next((name for name in tool_names() if environment_of(name).state == "installed"), None)
    if tool is None:
        pytest.skip("no tool is installed: qlib tools install gptqmodel")
    own = OWN.get(tool, {})
    with pytest.raises(UserError, match=f"^{tool}: .*128[^\n]*$"):  # rows of 96 have no groups of 128
        run_tool(Options(tool, **own), model_folder(hidden_size=96), torch.ones(2, 16, dtype=torch.int64))
