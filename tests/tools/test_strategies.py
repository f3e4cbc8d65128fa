"""Strategies of the family tool: what is allowed, in which kernel they run, what makes them out of date."""

import re
import sysconfig
from importlib import metadata
from pathlib import Path

import pytest

from qlib.compress import compress
from qlib.data.corpus import _distribution
from qlib.errors import UserError
from qlib.params import from_dict, load_strategies, to_dict, tool_of
from qlib.tools.about import tool_names
from qlib.runs.execute import execute
from qlib.runs.key import key_parts
from qlib.tools.environments import environment_of

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "params").glob("tool-*.yaml"))


def test_every_tool_has_strategies_with_the_same_text():
    strategies = load_strategies(FILES, ROOT)
    assert {tool_of(strategy) for strategy in strategies} == set(tool_names())
    assert len({(strategy.calibration.samples, strategy.calibration.length) for strategy in strategies}) == 1
    assert tool_of(load_strategies([ROOT / "params" / "rtn-int4.yaml"], ROOT)[0]) is None


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"family": "combined"}, "recipe: pass tool is not allowed for family combined"),
        ({"recipe": [{"pass": "rtn"}]}, "recipe: rtn is not allowed for family tool; allowed: {pass: tool} alone"),
        ({"recipe": [{"pass": "tool", "name": "gptq-model"}]}, "name: 'gptq-model' is no tool (did you mean 'gptqmodel'"),
        ({"recipe": [{"pass": "tool", "kind": "Q4_0"}]}, "kind: Q4_0 is not allowed for gptqmodel; allowed: null"),
        ({"recipe": [{"pass": "tool", "name": "llama-cpp"}]}, "kind: null is not allowed for llama-cpp; allowed: Q8"),
        (
            {"recipe": [{"pass": "tool", "name": "llama-cpp", "kind": "Q2_0"}]},
            "recipe[0]: kind: Q2_0 needs bits: 2, group_size: 64, symmetric: true",
        ),
        ({"recipe": [{"pass": "tool", "bits": 5}]}, "recipe[0].bits: 5 is not allowed; allowed: 2, 3, 4, 8"),
    ],
)
def test_what_cannot_be_is_refused(changes, problem):
    values = to_dict(load_strategies(FILES[:1], ROOT)[0])
    with pytest.raises(UserError, match=re.escape(problem)):
        from_dict(values | changes, "file")


def test_key_holds_lock_and_adapter():
    strategy = load_strategies([ROOT / "params" / "tool-gptqmodel-int4.yaml"], ROOT)[0]
    parts = key_parts(strategy, ROOT)
    assert parts["packages"] == {"params/tools/gptqmodel.lock": environment_of("gptqmodel", ROOT).lock_hash()}
    assert {"qlib.tools.adapters.gptqmodel", "qlib.tools.adapter", "qlib.quantize.tool"} <= parts["sources"].keys()
    assert "qlib.tools.adapters.auto_round" not in parts["sources"]


def test_a_tool_that_is_not_installed_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("QLIB_TOOLS", str(tmp_path / "none"))
    strategy = load_strategies([ROOT / "params" / "tool-gptqmodel-int4.yaml"], ROOT)[0]
    outcome = execute(strategy, ROOT, tmp_path / "runs", {})
    assert (outcome.state, outcome.bad_input, outcome.cell) == ("failed", True, None)
    assert outcome.cause == "gptqmodel is not installed: run `qlib tools install gptqmodel`"


def test_corpus_may_lie_in_another_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("QLIB_CORPUS", sysconfig.get_path("purelib"))
    assert _distribution.__wrapped__("numpy").version == metadata.version("numpy")
    monkeypatch.setenv("QLIB_CORPUS", str(tmp_path))
    with pytest.raises(UserError, match="package 'numpy' is not installed"):
        _distribution.__wrapped__("numpy")


def test_pass_is_refused_outside_of_the_tools_environment(model_folder):
    from qlib.models.load import load

    folder = model_folder(hidden_size=128)
    with pytest.raises(UserError, match="name: gptqmodel is not in this environment"):
        compress(load(str(folder)), [{"pass": "tool", "group_size": None}], None)
