"""Benchmarks that a machine cannot run leave the rows of another one alone."""

import json
from dataclasses import replace

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


def test_rows_that_the_time_did_not_suffice_for_stay(without_gpu, monkeypatch, tmp_path, capsys):
    """The first run reaches a; the second b alone, so that a's row stays; c was never reached."""
    module, target = "qlib.bench.bench_growth", tmp_path / "bench.json"
    monkeypatch.setattr(f"{module}.LIMITED", True, raising=False)

    def measure(found: str, late: list[str]):
        row = replace(judge(f"over {found}", ">= 1", 2.0, "times", ""), facts={"strategies": [found]})
        monkeypatch.setattr(f"{module}.measure", lambda root, limit: ([row], late))
        command.run_benchmarks(["growth"], target, 60, tmp_path)
        return [(row["name"], row["how"]) for row in json.loads(target.read_text())]

    first = measure("a", ["b", "c"])
    assert [name for name, _ in first] == ["over a", "growth: 2 more strategies"] and first[1][1].endswith("was over before b, c")
    second = measure("b", ["a", "c"])
    assert [name for name, _ in second] == ["over b", "growth: 1 more strategies", "over a"] and second[1][1].endswith("before c")


def test_some_strategies_alone(without_gpu, monkeypatch, tmp_path, capsys):
    """a and b share a row; c's stays as it was."""
    module, target = "qlib.bench.bench_growth", tmp_path / "bench.json"
    (tmp_path / "params").mkdir()
    for name in "abc":
        (tmp_path / "params" / f"{name}.yaml").touch()

    def rows(turn, speed):
        found, late = [], []
        for names in (["a", "b"], ["c"]):
            if turn(names):
                found.append(replace(judge(f"over {names[0]}", ">= 1", speed, "times", ""), facts={"strategies": names}))
            else:
                late += names
        return found, late

    with pytest.raises(UserError, match="--strategies: 'growth' has no rows for strategies"):
        command.run_benchmarks(["growth"], target, 60, tmp_path, ["a"])
    monkeypatch.setattr(f"{module}.LIMITED", True, raising=False)
    for speed, strategies in ((2.0, []), (3.0, ["b"])):
        monkeypatch.setattr(f"{module}.measure", lambda root, turn: rows(turn, speed))
        command.run_benchmarks(["growth"], target, 60, tmp_path, strategies)
    found = {row["name"]: row["measured"] for row in json.loads(target.read_text())}
    assert found == {"over a": 3.0, "over c": 2.0}
    for wrong, words in ((["cc"], "--strategies: params/ has no 'cc'"), (["b"], "--strategies: say of which benchmarks")):
        with pytest.raises(UserError, match=words):
            command.run_benchmarks(["growth"] if wrong == ["cc"] else [], target, 60, tmp_path, wrong)
