"""Benchmarks that a machine cannot run leave the rows of another one alone."""

import json

import pytest

from qlib.bench import bench_gpu, command
from qlib.bench.rows import judge
from qlib.errors import UserError


@pytest.fixture
def without_gpu(monkeypatch):
    monkeypatch.setattr(command, "gpu", lambda: None)
    monkeypatch.setattr(command, "benchmarks", lambda: {"gpu": "What a GPU does.", "growth": "How times grow."})
    monkeypatch.setattr("qlib.bench.bench_growth.measure", lambda root: [judge("growth", "<= 3", 2.5, "exponent", "")])


def test_rows_measured_on_a_gpu_stay(without_gpu, tmp_path, capsys):
    target, old = tmp_path / "bench.json", {"benchmark": "gpu", "name": "decode", "measured": 2.0, "met": False}
    target.write_text(json.dumps([old]))
    assert command.run_benchmarks([], target, 60, tmp_path) == 0
    rows = json.loads(target.read_text())
    assert rows[0] == old and rows[1]["name"] == "growth"
    assert "gpu: needs a GPU; rows that were measured on one stay" in capsys.readouterr().out


def test_asked_for_by_name_it_is_refused(without_gpu, tmp_path):
    with pytest.raises(UserError, match="--only: 'gpu' needs a GPU"):
        command.run_benchmarks(["gpu"], tmp_path / "bench.json", 60, tmp_path)
    assert not (tmp_path / "bench.json").exists() and bench_gpu.NEEDS == "cuda"
