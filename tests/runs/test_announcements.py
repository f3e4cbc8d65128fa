"""What is said before and during a run."""

import json
import sys

from qlib.params import from_dict
from qlib.runs import estimate as module
from qlib.runs.display import Line
from qlib.runs.estimate import HERE, PUBLISHED, Estimate, announce, estimate
from tiny_project import PLAIN


def test_estimates_rest_on_the_nearest_record(tmp_path):
    strategy = from_dict(PLAIN | {"model": "reference-2"}, "x")
    here = {"duration_seconds": 60.0, "peak_memory_bytes": {"value": 2e9}}
    assert estimate(strategy, here, tmp_path, "words") == Estimate("plain", 60.0, 2e9, HERE)
    assert estimate(strategy, None, tmp_path, "words") == Estimate("plain", None, None, "words")
    folder = tmp_path / "records" / "plain"
    folder.mkdir(parents=True)
    (folder / "record.json").write_text(json.dumps(here | {"model": "reference-2"}))
    assert estimate(strategy, None, tmp_path, "words").source == PUBLISHED
    (folder / "record.json").write_text(json.dumps(here | {"model": "another"}))
    assert estimate(strategy, None, tmp_path, "words").source == "words"


def test_announcement_warns_when_memory_will_not_do(monkeypatch):
    monkeypatch.setattr(module, "available_memory", lambda: 4_000_000_000)
    lines = announce([Estimate("a", 60, 5e9, HERE), Estimate("b", 30, 1e9, PUBLISHED), Estimate("c", source="an hour")])
    assert lines == [
        "about 1 min 30 s and 5.0 GB of memory, from earlier runs here and published runs on another machine",
        "warning: a took 5.0 GB of memory, 4.0 GB are free",
        "c: not run before; its file says: an hour",
    ]
    assert announce([]) == []


def test_plain_lines_now_and_then(capsys):
    line = Line("plain", 100.0, every=0.0)
    line.update(40.0, 2, 6)
    line.update(130.0, 6, 6)
    line.close("plain: done in 2 min 10 s")
    assert capsys.readouterr().err == (
        "plain: cell 2/6, 40 s, about 1 min 00 s left\n"
        "plain: cell 6/6, 2 min 10 s, longer than the 1 min 40 s before\n"
        "plain: done in 2 min 10 s\n"
    )
    quiet = Line("plain", None)
    quiet.update(1.0, 1, 6)
    assert capsys.readouterr().err == ""


def test_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    line = Line("plain", None)
    line.update(3.0, 4, 7)
    line.close("plain: done in 5 s")
    bar, _, end = capsys.readouterr().err.partition("\033[K")
    assert bar == "\rplain  [##########--------------] cell 4/7  3 s" and end == "\r\033[Kplain: done in 5 s\n"


def test_bad_input_found_by_the_notebook_is_told_in_one_line(capsys):
    from qlib.runs.execute import Outcome
    from qlib.runs.runner import _summary

    refused = Outcome("failed", "UserError: model: is bad", last_lines=["Traceback"], bad_input=True)
    assert _summary([("one", Outcome("done")), ("two", refused)]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert _summary([("two", refused), ("three", Outcome("failed", "ValueError: x", last_lines=["Traceback"]))]) == 1
    assert "Traceback" in capsys.readouterr().err
    assert _summary([("one", Outcome("done"))]) == 0
