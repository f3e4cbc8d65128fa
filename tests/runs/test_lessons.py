"""Lessons run like strategies and after them, once, and again only if their code or what they read changed."""

import json
import shutil

from tiny_project import PLAIN, write_lesson, write_notebook

from qlib import cli
from qlib.params import from_dict
from qlib.runs import runner
from qlib.runs.key import differences, key_parts
from qlib.runs.lessons import find_lessons, opening, result_of
from qlib.runs.runner import Job, _order
from qlib.runs.state import state_of


def test_a_lesson_runs_after_its_family_and_again_if_what_it_reads_changed(project):
    project.add("one")
    write_lesson(project.root, "baseline")
    write_lesson(project.root, "pruning")
    first = project.call("run")
    assert first.code == 0, first.err
    assert "1 of 1 strategies and 1 of 1 lessons to run" in first.err
    assert project.executions() == ["one", "lesson-baseline"]  # no strategy of the family pruning, no lesson
    folder = project.folder("lesson-baseline")
    assert {f.name for f in folder.iterdir()} == {".lock", "notebook.ipynb", "record.json", "status.json"}
    record = json.loads((folder / "record.json").read_text())
    assert (record["family"], record["measurements"], record["model"]) == ("lesson", {}, folder.parts[-3])
    assert record["key"] and record["duration_seconds"] > 0 and record["provenance"]["seed"] == 0
    assert record["key_parts"]["records"] == {"one": json.loads((folder.parent / "one/record.json").read_text())["key"]}

    write_lesson(project.root, "baseline", prose="Better words.")
    second = project.call("run")
    assert second.code == 0 and project.executions() == []
    assert "0 of 1 strategies and 0 of 1 lessons to run: all are up to date" in second.err

    write_lesson(project.root, "baseline", "print('look again')")
    assert project.call("run").code == 0 and project.executions() == ["lesson-baseline"]

    project.add("one", seed=4)
    assert project.call("run").code == 0 and project.executions() == ["one", "lesson-baseline"]
    rows = [line.split() for line in project.call("list").out.splitlines()]
    assert [row[0] for row in rows[1:]] == ["one", "lesson-baseline", "lesson-pruning"]
    assert rows[2][1:3] == ["lesson", "done"] and rows[3][1:] == ["lesson", "never", "run"]
    assert "All about baseline (lesson, notebooks/lessons/baseline.ipynb)\nstate: done" in project.call(
        "show", "lesson-baseline"
    ).out


def test_which_lessons_are_run(project, monkeypatch):
    monkeypatch.chdir(project.root)
    monkeypatch.setenv("QLIB_CACHE", str(project.runs / "cache"))
    monkeypatch.setattr("qlib.runs.command.signal.signal", lambda *_: None)
    monkeypatch.setattr(runner, "run_all", lambda jobs, *_: sorted(job.strategy.name for job in jobs))
    project.add("one")
    project.add("smallest", tier="smoke")
    for family in ("baseline", "pruning"):
        write_lesson(project.root, family)
    assert cli.main(["run"]) == cli.main(["run", "--tier", "full"]) == ["lesson-baseline", "one"]
    assert cli.main(["run", "--tier", "smoke"]) == ["smallest"]
    assert cli.main(["run", "--model", "model"]) == cli.main(["run", "one"]) == ["one"]
    assert cli.main(["run", "notebooks/lessons/pruning.ipynb"]) == ["lesson-pruning"]
    assert cli.main(["run", "lesson-pruning", "one", "--model", "model"]) == ["lesson-pruning", "one"]


def test_lessons_are_published(project, monkeypatch, capsys):
    monkeypatch.chdir(project.root)
    monkeypatch.setenv("QLIB_CACHE", str(project.runs / "cache"))
    project.add("one")
    write_lesson(project.root, "baseline")
    lesson = find_lessons(project.root)[0]
    folder = state_of(lesson, project.root, project.runs).folder
    folder.mkdir(parents=True)
    (folder / "record.json").write_text(json.dumps(result_of(lesson) | {"key": "k", "duration_seconds": 61}))
    (folder / "status.json").write_text('{"state": "done"}')
    page = project.root / "reports" / "notebooks" / "lesson-baseline.html"
    page.parent.mkdir()
    for file in (page, page.parent.parent / "index.html"):
        file.write_text("<p>page</p>")
    assert cli.main(["publish"]) == 0
    published = project.root / "reports" / "published"
    assert {str(file.relative_to(published)) for file in published.rglob("*") if file.is_file()} == {
        "index.html", "notebooks/lesson-baseline.html", "records/lesson-baseline/record.json",
    }  # fmt: skip
    shutil.rmtree(project.runs)
    capsys.readouterr()
    cli.main(["list"])
    listed = " ".join(capsys.readouterr().out.splitlines()[2].split())
    assert listed == "lesson-baseline lesson published 1 min 01 s"


def test_what_a_lesson_reads(project):
    write_lesson(project.root, "pruning")
    lesson = find_lessons(project.root)[0]
    beside = state_of(lesson, project.root, project.runs).folder.parent
    for name, values in {
        "a": {"family": "pruning", "key": "1"},
        "b": {"family": "baseline", "key": "2"},
        "c": {"family": "mixed_precision", "key": "3"},
        "d": {"family": "pruning", "key": "4", "tier": "smoke"},
        "e": {"family": "pruning"},
    }.items():
        (beside / name).mkdir(parents=True)
        (beside / name / "record.json").write_text(json.dumps(values))
    parts = state_of(lesson, project.root, project.runs).parts
    assert parts["records"] == {"a": "1", "b": "2"}
    assert differences(parts | {"records": {"a": "0"}}, parts) == ["records a changed", "records b new"]


def test_a_failing_lesson_is_labelled_and_stops_nothing(project):
    project.add("plain")
    write_lesson(project.root, "baseline", "raise ValueError('no such figure')")
    write_lesson(project.root, "pruning")
    run = project.call("run", "plain", "lesson-baseline", "lesson-pruning")
    assert run.code == 1 and project.executions() == ["plain", "lesson-baseline", "lesson-pruning"]
    assert "lesson-baseline: failed, cell 5 (id body): ValueError: no such figure" in run.err
    status = project.status("lesson-baseline")
    assert (status["state"], status["cell"]["id"]) == ("failed", "body")
    folder = project.folder("lesson-baseline")
    assert (folder / "failed.ipynb").exists() and not (folder / "record.json").exists()
    assert project.status("lesson-pruning")["state"] == project.status("plain")["state"] == "done"
    assert "state: failed\n    ValueError: no such figure" in project.call("show", "lesson-baseline").out

    # A strategy that fails leaves its record as it is: nothing new to read.
    write_lesson(project.root, "baseline")
    assert project.call("run").code == 0 and project.executions() == ["lesson-baseline"]
    write_notebook(project.root / "notebooks" / "plain.ipynb", "raise ValueError('now it fails')")
    assert project.call("run").code == 1 and project.executions() == ["plain"]


def test_lessons_that_are_not_there(project):
    project.add("plain")
    write_lesson(project.root, "baseline")
    for arguments, words in (
        (["lesson-basline"], "no such lesson (did you mean 'lesson-baseline'?)"),
        (["notebooks/plain.ipynb"], "is no lesson; allowed: strategy files"),
        (["lesson-baseline", "-p", "seed=1"], "-p: lesson-baseline is a lesson"),
    ):
        run = project.call("run", *arguments)
        assert run.code == 2 and words in run.err and run.err.count("\n") == 1, run.err
    (project.root / "notebooks/lessons/baseline.ipynb").write_text("{}")
    assert "baseline.ipynb: is not a lesson that can be read" in project.call("run").err
    assert project.executions() == []


def test_a_lesson_depends_on_the_passes_that_its_code_names(project):
    write_lesson(project.root, "pruning", "recipe = [{'pass': 'rtn', 'bits': 3}]")
    write_lesson(project.root, "combined")
    parts = {lesson.name: key_parts(lesson, project.root) for lesson in find_lessons(project.root)}
    assert "qlib.quantize.rtn" in parts["lesson-pruning"]["sources"]
    assert "qlib.quantize.rtn" not in parts["lesson-combined"]["sources"]


def test_order_of_a_run(project):
    write_lesson(project.root, "pruning")
    speed = {"family": "speed", "formats": ["bf16"], "name": "speed"}
    jobs = [from_dict(PLAIN | speed, "x"), *find_lessons(project.root)]
    pruning = {"family": "pruning", "name": "p", "recipe": [{"pass": "rtn"}]}
    jobs += [from_dict(PLAIN | pruning, "x"), from_dict(PLAIN, "x")]
    ordered = sorted((Job(job, project.root) for job in jobs), key=_order)
    assert [job.strategy.name for job in ordered] == ["plain", "p", "lesson-pruning", "speed"]


def test_the_first_sentence_of_the_opening():
    def cells(text):
        return [{"cell_type": "markdown", "source": [text]}]

    assert opening(cells("# T\n\nWhy {{ a: b.c }} of\n2.5? Because.\n\nMore.")) == "Why {{ a: b.c }} of 2.5?"
    assert opening(cells("# T")) == opening([]) == ""
    assert opening([*cells("# T"), *cells("Two cells")]) == "Two cells"
