"""A record holds what its family needs, in the right units, finite, and is written whole or not at all."""

import json
import os

import numpy as np
import pytest

from qlib import notebook
from qlib.errors import UserError
from qlib.notebook import start
from qlib.paths import write_atomic
from qlib.record import REQUIRED, UNITS, Measurement, check_measurements, plain, record, unit_of

BASELINE = {
    "name": "baseline",
    "title": {"en": "Baseline", "zh": "基线"},
    "family": "baseline",
    "tier": "core",
    "notebook": "baseline.ipynb",
    "model": "reference-2",
    "seed": 3,
}


def measured(family: str = "baseline", **changes):
    return {name: {"value": 1.5, "unit": UNITS[name]} for name in REQUIRED[family]} | changes


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("QLIB_RUN_DIR", str(tmp_path / "work"))
    monkeypatch.setattr(notebook, "_show", lambda strategy: None)
    return start(dict(BASELINE))


def test_written_result(run):
    value = Measurement(np.float32(90.5), "percent", n=np.int64(3000), low=89.0, high=92.0, method="four choices")
    details = {
        "protocol": "one line",
        "items": {"scores": np.arange(5)},
        "kept": {"heads": 0.5, "ffn": 1.0, "layers": 1.0},
        "shape_format": "bf16",
        "layers": [{"name": "q", "error": np.float64(0.25), "shape": (2, 3)}],
    }
    result = record(run, measured(**{"quality.accuracy": value}), details)
    written = json.loads((run.folder / "result.json").read_text(encoding="utf-8"))
    assert written == result
    assert written["measurements"]["quality.accuracy"] == {
        "value": 90.5, "unit": "percent", "n": 3000, "low": 89.0, "high": 92.0, "method": "four choices",
        "conditions": "",
    }  # fmt: skip
    assert written["measurements"]["quality.perplexity"]["low"] is None
    assert written["protocol"] == "one line" and written["kept"]["heads"] == 0.5 and written["shape_format"] == "bf16"
    assert written["details"] == {"layers": [{"name": "q", "error": 0.25, "shape": [2, 3]}]}
    assert written["params"]["seed"] == 3 and written["model"] == "reference-2" and written["device"] == "cpu"
    assert np.load(run.folder / "items.npz")["scores"].tolist() == [0, 1, 2, 3, 4]
    assert {file.name for file in run.folder.iterdir()} == {"result.json", "items.npz"}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"quality.acuracy": 1}, "measurements: quality.acuracy: unknown name (did you mean 'quality.accuracy'?)"),
        ({"quality.accuracy": 0.9}, "measurements: quality.accuracy: 0.9 is no Measurement"),
        ({"quality.accuracy": {"value": None}}, "measurements: quality.accuracy: has no value"),
        ({"quality.accuracy": {"value": float("nan")}}, "measurements: quality.accuracy.value: nan is not a finite"),
        ({"quality.accuracy": {"value": 1.0, "high": np.inf}}, "measurements: quality.accuracy.high: inf is not"),
        ({"quality.accuracy": {"value": 1.0, "unit": "fraction"}}, "measurements: quality.accuracy.unit: 'fraction'"),
        ({"quality.accuracy": {"value": "1"}}, "measurements: quality.accuracy.value: '1' is no number"),
        ({"quality.accuracy": {"value": 1.0, "low": 2.0, "high": 1.0}}, "measurements: quality.accuracy: the interval"),
        ({"quality.accuracy": {"value": 1.0, "low": 2.0}}, "measurements: quality.accuracy: the interval"),
        ({"quality.accuracy": {"value": 1.0, "mean": 2.0}}, "measurements: quality.accuracy.mean: unknown field"),
    ],
)
def test_refused_measurements(run, changes, line):
    with pytest.raises(UserError) as caught:
        record(run, measured(**changes))
    assert str(caught.value).startswith(line)
    assert not list(run.folder.iterdir())


def test_missing_measurements_are_named():
    partial = measured("weight_quantization")
    del partial["quality.kl"]
    with pytest.raises(UserError, match="family weight_quantization needs quality.kl"):
        check_measurements(partial, "weight_quantization")
    whole = check_measurements(measured("weight_quantization"), "weight_quantization")
    assert set(whole) == set(partial) | {"quality.kl"}


def test_details_that_json_cannot_hold():
    with pytest.raises(UserError, match=r"details.layers\[1\].error: nan is not a finite number"):
        plain({"layers": [{}, {"error": float("nan")}]}, "details")
    with pytest.raises(UserError, match="details.model: object cannot be written"):
        plain({"model": object()}, "details")
    assert plain({"a": np.ones((1, 2)), 1: (True, None)}, "details") == {"a": [[1.0, 1.0]], "1": [True, None]}


def test_speed_records_hold_formats(tmp_path, monkeypatch):
    monkeypatch.setenv("QLIB_RUN_DIR", str(tmp_path))
    monkeypatch.setattr(notebook, "_show", lambda strategy: None)
    run = start(BASELINE | {"name": "speed", "family": "speed", "formats": ["bf16", "int8"], "model": "qwen-72b"})
    one = {"latency.decode_ms": {"value": 1.0}}
    with pytest.raises(UserError, match="formats: 'int8' is missing"):
        record(run, {}, {"formats": {"bf16": one}})
    with pytest.raises(UserError, match=r"formats.int8.latency.dcode_ms: unknown name"):
        record(run, {}, {"formats": {"bf16": one, "int8": {"latency.dcode_ms": {"value": 1.0}}}})
    result = record(run, {}, {"formats": {"bf16": one, "int8": one}, "layer": {"rounds": 3}})
    assert result["formats"]["int8"]["latency.decode_ms"]["unit"] == "ms" and result["measurements"] == {}
    assert result["model"] == "qwen-72b" and result["details"] == {"layer": {"rounds": 3}}


def test_units_of_tasks():
    assert unit_of("task.arc_easy") == "percent" and unit_of("task.") is None and unit_of("quality.x") is None


def test_start_refuses_what_the_schema_does_not_know(tmp_path, monkeypatch):
    monkeypatch.setenv("QLIB_RUN_DIR", str(tmp_path / "never"))
    with pytest.raises(UserError, match=r"parameters: 'sed' is unknown \(did you mean 'seed'\?\)"):
        start(BASELINE | {"sed": 1})
    with pytest.raises(UserError, match=r"parameters: seed: 'one' is not allowed"):
        start(BASELINE | {"seed": "one", "In": [""]})
    with pytest.raises(UserError, match=r"parameters: 'sed' is unknown"):
        start(BASELINE | {"In": ["", "# Parameters\nseed = 1\nsed = 2\n"]})
    assert not (tmp_path / "never").exists()


def test_start_may_be_called_again_after_later_cells(tmp_path, monkeypatch):
    monkeypatch.setenv("QLIB_RUN_DIR", str(tmp_path))
    monkeypatch.setattr(notebook, "_show", lambda strategy: None)
    later = {"In": ["", "# Parameters\nseed = 3\n", "result = {}"], "result": {}, "measurements": {}}
    assert start(BASELINE | later).seed == 3


def test_parameters_and_provenance_are_shown(tmp_path, monkeypatch):
    import IPython.display

    monkeypatch.setenv("QLIB_RUN_DIR", str(tmp_path))
    shown = []
    monkeypatch.setattr(IPython.display, "display", lambda html: shown.append(html.data))
    start(BASELINE | {"title": {"en": "<b>", "zh": "x"}})
    text = "".join(shown)
    assert "<caption>Parameters</caption>" in text and '<th scope="row">evaluation.documents</th><td>all</td>' in text
    assert "&lt;b&gt;" in text and '<th scope="row">python</th>' in text and "torch 2" in text


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    file = write_atomic(tmp_path / "file", "old")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        write_atomic(file, "new")
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]
