"""`qlib export` finds the model of a strategy and writes it; it replaces nothing."""

import json

import pytest

from qlib.cli import main
from qlib.models.save import save
from qlib.quantize.formats import Grid


@pytest.fixture
def runs(quantized, tmp_path):
    folder = tmp_path / "runs" / "tiny" / "cpu"
    save(quantized(Grid(4, 64)), folder / "rtn-int4" / "model")
    (folder / "tool-int4").mkdir()
    return tmp_path / "runs"


def export(runs, name, folder, format_="compressed_tensors"):
    return main(["export", str(name), "--format", format_, "--output", str(folder), "--runs", str(runs)])


def test_a_strategy_and_a_folder(runs, tmp_path, capsys):
    assert export(runs, "rtn-int4", tmp_path / "a") == 0
    assert "vLLM 0.33.0: loads it" in capsys.readouterr().out
    assert export(runs, runs / "tiny" / "cpu" / "rtn-int4" / "model", tmp_path / "b", "gptq") == 0
    assert "bits: 4 asymmetric is not allowed" in capsys.readouterr().out
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in "ab"]
    assert [one["quantization_config"]["quant_method"] for one in configs] == ["compressed-tensors", "gptq"]


@pytest.mark.parametrize(
    "name, words",
    [("rtn-int3", "has not run here (did you mean 'rtn-int4'?)"), ("tool-int4", "tool-int4: its run kept no model")],
)
def test_there_is_nothing_to_export(runs, tmp_path, capsys, name, words):
    assert export(runs, name, tmp_path / "out") == 2
    assert words in capsys.readouterr().err


def test_two_models_need_a_choice(runs, tmp_path, capsys, quantized):
    save(quantized(Grid(8)), runs / "other" / "cpu" / "rtn-int4" / "model")
    assert export(runs, "rtn-int4", tmp_path / "out") == 2
    assert "ran on several models (other, tiny); choose one with --model" in capsys.readouterr().err


def test_what_is_there_stays(runs, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    assert export(runs, "rtn-int4", tmp_path / "mine") == 2
    assert "is there already" in capsys.readouterr().err and (tmp_path / "mine" / "file").exists()
