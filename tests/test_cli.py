"""The command line: bad input is one line and exit code 2, and what is quick stays quick."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from qlib import cli
from qlib.models.shapes import find_shape
from qlib.runs.join import joined, speed_records
from qlib.runs.publish import publish

TITLE = {"en": "Baseline", "zh": "基线"}
STRATEGY = {
    "name": "baseline",
    "title": TITLE,
    "family": "baseline",
    "tier": "core",
    "notebook": "baseline.ipynb",
    "model": "model",
    "evaluation": {"text": "text.txt"},
}
CELLS = [
    {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": [f"{name} = 0\n" for name in STRATEGY]},
    {"cell_type": "code", "metadata": {}, "source": "import qlib\nrun = qlib.start(globals())"},
]


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    for folder in ("params", "notebooks", "model"):
        (tmp_path / folder).mkdir()
    (tmp_path / "params" / "baseline.yaml").write_text("# a minute\n" + json.dumps(STRATEGY))
    (tmp_path / "notebooks" / "baseline.ipynb").write_text(json.dumps({"cells": CELLS}))
    (tmp_path / "model" / "config.json").write_text("{}")
    save_file({"weight": np.zeros(2, dtype=np.float32)}, tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    (tmp_path / "text.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("QLIB_CACHE", raising=False)
    monkeypatch.setattr("qlib.runs.command.signal.signal", lambda *a: None)
    monkeypatch.setitem(os.environ, "QLIB_CACHE", str(tmp_path / "cache"))
    return tmp_path


def refused(capsys, *arguments: str) -> str:
    """The one line on stderr of a command that exits with 2."""
    try:
        code = cli.main(arguments)
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr()
    assert code == 2 and not printed.out
    assert printed.err.count("\n") == 1, printed.err
    return printed.err


def change(root: Path, **values) -> None:
    (root / "params" / "baseline.yaml").write_text(json.dumps(STRATEGY | values))


def test_bad_input_in_strategy_files(root, capsys):
    change(root, sed=1)
    assert "baseline.yaml: sed: unknown field (did you mean 'seed'?)" in refused(capsys, "run")
    change(root, notebook="basline.ipynb")
    assert "(did you mean 'baseline.ipynb'?)" in refused(capsys, "run")
    change(root, seed="zero")
    assert "seed: 'zero' is not allowed" in refused(capsys, "list")
    (root / "params" / "baseline.yaml").write_text("a: [")
    assert "baseline.yaml: is not YAML" in refused(capsys, "run")
    change(root)
    (root / "params" / "copy.yaml").write_text(json.dumps(STRATEGY))
    assert "copy.yaml: name: 'baseline' is already used by params/baseline.yaml" in refused(capsys, "run")


def test_bad_input_on_the_command_line(root, capsys):
    assert "no such strategy file (did you mean 'baseline'?)" in refused(capsys, "run", "baselin")
    assert "-p seed: is not key=value" in refused(capsys, "run", "baseline", "-p", "seed")
    assert "-p sed: 'sed' is unknown" in refused(capsys, "run", "baseline", "-p", "sed=1")
    assert "-p: name the strategies" in refused(capsys, "run", "-p", "seed=1")
    assert "takes no such parameter" in refused(capsys, "run", "baseline", "-p", "rounds=3")
    assert "no strategy of tier smoke" in refused(capsys, "run", "--tier", "smoke")
    change(root, tier="gpu")
    assert "baseline: strategies of tier gpu need one; allowed: --device cuda" in refused(capsys, "run", "baseline")
    change(root)
    assert "invalid choice: 'fast'" in refused(capsys, "run", "--tier", "fast")
    assert "--limit: invalid" in refused(capsys, "run", "--limit", "soon")
    assert "0 is not a number of seconds above 0" in refused(capsys, "run", "--limit", "0")
    assert "nothing: has no record; there are: none" in refused(capsys, "show", "nothing")
    assert "there is no report to publish" in refused(capsys, "publish")


def test_bad_models(root, capsys):
    assert "neither 'reference-2', nor an existing folder" in refused(capsys, "run", "--model", "./nowhere")
    (root / "model" / "tokenizer.json").rename(root / "model" / "tokens.json")
    assert "model: has no tokenizer" in refused(capsys, "run")
    (root / "model" / "tokens.json").rename(root / "model" / "tokenizer.json")
    whole = (root / "model" / "model.safetensors").read_bytes()
    (root / "model" / "model.safetensors").write_bytes(whole[:-3])
    assert "model.safetensors: is truncated" in refused(capsys, "run")
    assert "'nope.ipynb' is not in notebooks/" in refused(capsys, "run", "baseline", "-p", "notebook=nope.ipynb")
    (root / "model" / "model.safetensors").rename(root / "model" / "pytorch_model.bin")
    assert "holds only pytorch_model.bin, which may run code when loaded" in refused(capsys, "run")
    (root / "model" / "config.json").unlink()
    assert "holds no config.json" in refused(capsys, "run")
    change(root, evaluation={"text": "missing.txt"})
    (root / "model" / "config.json").write_text("{}")
    (root / "model" / "model.safetensors").write_bytes(whole)
    assert "text: 'missing.txt' is not an existing file or folder" in refused(capsys, "run")


def test_unwritable_folder(root, capsys):
    (root / "file").write_text("in the way")
    assert "cannot be written: Not a directory; choose another" in refused(capsys, "run", "--runs", "file/runs")


def test_outside_a_project(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "go to the project" in refused(capsys, "list")


def test_list_of_what_was_never_run_and_of_what_was_published(root, capsys):
    assert cli.main(["list"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["baseline", "core", "never", "run"]
    (root / "params" / "broken.yaml").write_text(json.dumps(STRATEGY | {"name": "broken", "model": "./gone"}))
    cli.main(["list", "--why"])
    assert "broken: cannot run\n    model: './gone' is neither" in capsys.readouterr().out


def _record(name: str, **changes) -> dict:
    accuracy = {"value": 90.82, "unit": "percent", "n": 10, "low": 90, "high": 91, "conditions": ""}
    common = {"name": name, "title": TITLE, "family": "weight_quantization", "model": "reference-2", "device": "cpu"}
    measured = {"measurements": {"quality.accuracy": accuracy}, "duration_seconds": 61}
    rest = measured | {"shape_format": "int8", "kept": {"heads": 1.0}, "key": "k"}
    return common | rest | changes


def _write(folder: Path, record: dict) -> None:
    folder.mkdir(parents=True)
    (folder / "record.json").write_text(json.dumps(record))
    (folder / "status.json").write_text('{"state": "done"}')


def test_show_joins_the_figures_of_the_shape(root, capsys):
    runs = root / "reports" / "runs"
    decode = {"value": 11.9, "unit": "ms", "n": 10, "low": 11, "high": 12, "method": "", "conditions": "context 256"}
    formats = {"int8": {"latency.decode_ms": decode}}
    _write(runs / "reference-2" / "cpu" / "rtn-int8", _record("rtn-int8"))
    _write(runs / "qwen-1b" / "cpu" / "speed", _record("speed", family="speed", model="qwen-1b", formats=formats))
    assert cli.main(["show", "rtn-int8", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["measurements"]
    assert shown["shape.latency.decode_ms"]["conditions"] == "shape of qwen-1b, random weights; context 256"
    better = {"int8": {"latency.decode_ms": decode | {"value": 5.0}}}
    speed = _record("speed-72b", family="speed", model="qwen-72b", formats=better)
    _write(runs / "qwen-72b" / "cpu" / "speed-72b", speed)
    speeds = speed_records(runs, root / "none")
    assert joined(_record("x"), speeds)["measurements"]["shape.latency.decode_ms"]["value"] == 5.0
    assert len(joined(_record("x", kept={"heads": 0.5}), speeds)["measurements"]) == 1
    assert len(joined(_record("x", device="nvidia-h200"), speeds)["measurements"]) == 1
    assert len(joined(_record("x", shape_format=None), speeds)["measurements"]) == 1
    untimed = joined(_record("x", shape_format="int3-g128"), speeds)["measurements"]
    assert untimed["shape.size.disk_bytes"]["value"] < 40e9 and "shape.latency.decode_ms" not in untimed
    mix = {name: {"int8": 0.5, "int4-g128": 0.5} for name in find_shape("qwen-72b").linears}
    mixed = joined(_record("x", shape_format=None, mix=mix), speeds)["measurements"]
    assert 40e9 < mixed["shape.size.disk_bytes"]["value"] < 70e9
    whole, half = (
        joined(_record("x", shape_format="bf16", kept={"weights": share}), speeds)["measurements"] for share in (1.0, 0.5)
    )
    linears = find_shape("qwen-72b").layers * find_shape("qwen-72b").linear_parameters
    saved = whole["shape.size.disk_bytes"]["value"] - half["shape.size.disk_bytes"]["value"]
    assert saved == linears * (16 - 1 - 8) / 8  # a bit of mask, and half of the weights
    assert whole["shape.size.resident_bytes"] == half["shape.size.resident_bytes"]
    assert cli.main(["show", "rtn-int8"]) == 0
    assert "shape.latency.decode_ms" in capsys.readouterr().out


def test_publish_keeps_what_was_not_run_here(root):
    from qlib.params import from_dict

    strategies = [from_dict(STRATEGY | {"name": name}, "x") for name in ("one", "two", "three")]
    runs, published, page = root / "reports" / "runs", root / "reports" / "published", root / "reports" / "index.html"
    from qlib.paths import slug

    _write(runs / slug("model") / "cpu" / "one", _record("one"))
    _write(runs / slug("model") / "nvidia-h200" / "one", _record("one", device="nvidia-h200"))
    _write(runs / slug("model") / "cpu" / "two", _record("two"))
    (runs / slug("model") / "cpu" / "two" / "status.json").write_text('{"state": "failed"}')
    _write(published / "records" / "two", _record("two", duration_seconds=1))
    _write(published / "records" / "gone", _record("gone"))
    page.write_text("<p>report</p>")
    (page.parent / "notebooks").mkdir()
    (page.parent / "notebooks" / "one.html").write_text("<p>one</p>")
    assert publish(strategies, runs, page, published) == ["one", "one@nvidia-h200"]
    names = sorted(str(file.relative_to(published)) for file in published.rglob("*") if file.is_file())
    assert names == [
        "index.html", "notebooks/one.html", "records/one/record.json", "records/one@nvidia-h200/record.json",
        "records/two/record.json", "records/two/status.json",
    ]  # fmt: skip
    assert json.loads((published / "records" / "two" / "record.json").read_text())["duration_seconds"] == 1
    assert sorted(p.name for p in (root / "reports").iterdir()) == ["index.html", "notebooks", "published", "runs"]
    publish(strategies, runs, page, published)


def test_import_is_quick_and_listing_needs_no_torch(root):
    code = "import sys, qlib, qlib.cli; qlib.cli.main(['list']); assert 'torch' not in sys.modules"
    environment = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parent.parent)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True)
    script = "import time; t = time.process_time(); import qlib; print(time.process_time() - t)"
    took = subprocess.run([sys.executable, "-c", script], check=True, env=environment, capture_output=True, text=True)
    assert float(took.stdout) < 0.3


def test_help_has_examples(capsys):
    for arguments in (["--help"], ["run", "--help"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 0 and "qlib run rtn-int4" in capsys.readouterr().out
