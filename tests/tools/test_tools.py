"""Each tool that is installed, in every setting that has a strategy: on a tiny model, inside its environment.

Fairness is tested here: the ids that reached the tool, its threads, its runtime with the uncompressed model.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qlib.errors import UserError
from qlib.evaluate.baseline import answer
from qlib.evaluate.items import build_items, cut_windows
from qlib.models.load import load
from qlib.params import load_strategies
from qlib.quantize.tool import Options
from qlib.tools.about import tool_names
from qlib.tools.adapter import put_weights
from qlib.tools.environments import environment_of
from qlib.tools.exam import Exam
from qlib.tools.run import run_tool
from qlib.tools.witness import hash_rows

pytestmark = [pytest.mark.tools, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
SMALL = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64}
#: As strategies run; OpenVINO 2026.4 ends with a division by zero where it has one, and AMX.
THREADS = 2
#: Some linears get more bits, or groups do not lie within a row: their own tests count values.
UNEVEN = {"llama-cpp", "neural-compressor"}
STRATEGIES = {one.name: one for one in load_strategies(sorted((ROOT / "params").glob("tool-*.yaml")), ROOT)}


@pytest.fixture(params=sorted(STRATEGIES))
def options(request) -> Options:
    step = {name: value for name, value in STRATEGIES[request.param].recipe[0].items() if name != "pass"}
    asked = Options(**step | ({"iterations": 2} if step.get("iterations") else {}))
    environment = environment_of(asked.name)
    if environment.state != "installed":
        pytest.skip(f"{asked.name} is {environment.state}: qlib tools install {asked.name}")
    return asked


def make_exam() -> Exam:
    generator = np.random.default_rng(0)
    documents = [generator.integers(1, 300, size=200) for _ in range(4)]
    items = build_items(documents, {"line": None, "any": None, "word": None}, 0, 6)
    return Exam(items, cut_windows(documents, 64), 0, len(documents))


def test_setting_on_a_tiny_model(options, model_folder, tmp_path):
    folder = model_folder("qwen2", **SMALL)
    ids = torch.from_numpy(np.random.default_rng(1).integers(1, 300, size=(16, 64)))
    exam = make_exam()
    found = run_tool(options, folder, ids, exam, tmp_path / "work", threads=THREADS)
    assert found.seconds > 0 and found.versions["torch"].startswith("2.13.0") and found.threads == THREADS
    assert options.bits <= found.bits_per_weight <= 9  # some keep each code in a byte, whatever its width
    assert found.seen in (None, hash_rows(ids))
    if found.uncompressed:
        assert found.uncompressed["its"] == pytest.approx(found.uncompressed["ours"], rel=1e-3)
    weights = {name.removesuffix(".weight"): weight for name, weight in load_file(found.weights).items()}
    if not weights:  # scored through its own runtime
        assert np.isfinite(found.answers.nll).all()
        return
    assert len(weights) == 14
    subject = load(str(folder))
    shifts = options.name == "nncf" and options.method.startswith("AWQ")
    unshifted = weights | (_undo_shift(weights, subject.model) if shifts else {})
    for name, weight in weights.items():  # at most as many values in a group as it has codes, near what they were
        exact = subject.model.get_submodule(name).weight.float()
        if options.name not in UNEVEN and options.bits < 8:
            assert max(len(group.unique()) for group in weight.reshape(-1, 32)) <= 2**options.bits, name
        assert (unshifted[name] - exact).norm() / exact.norm() < {8: 0.02, 4: 0.25, 3: 0.45, 2: 0.95}[options.bits], name
    put_weights(subject.model, weights)
    outside = answer(subject, exam.items, exam.texts, exam.start)
    for name in ("inside", "alone", "nll"):
        np.testing.assert_allclose(getattr(found.answers, name), getattr(outside, name), rtol=2e-5)
    np.testing.assert_array_equal(found.answers.tokens, outside.tokens)


def _undo_shift(weights: dict[str, torch.Tensor], model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The linears of gated units where AWQ moved scales from rows of the up projection into columns of the down projection:
    what moved is read from the columns, and has to be what the rows lack."""
    found = {}
    for down in (name for name in weights if name.endswith("down_proj")):
        up = down.replace("down_proj", "up_proj")
        moved = weights[down].norm(dim=0) / model.get_submodule(down).weight.float().norm(dim=0)
        found |= {down: weights[down] / moved, up: weights[up] * moved[:, None]}
    return found


def test_an_error_comes_back_as_one_line(tmp_path):
    tool = next((name for name in ("gptqmodel", "auto-gptq") if environment_of(name).state == "installed"), None)
    if tool is None:
        pytest.skip("no tool is installed: qlib tools install gptqmodel")
    with pytest.raises(UserError, match=f"^{tool}: [^\\n]+$"):  # there is no model
        run_tool(Options(tool), tmp_path, torch.ones(2, 16, dtype=torch.int64))


def test_all_tools_have_a_strategy_and_a_lock():
    assert {one.recipe[0]["name"] for one in STRATEGIES.values()} == set(tool_names())
    assert all(environment_of(name, ROOT).lock.is_file() for name in tool_names())
