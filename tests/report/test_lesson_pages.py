"""Lessons in the report: listed, linked, with current prose, and labelled where they failed."""

import re

import nbformat
import pytest
from nbformat.v4 import new_markdown_cell, new_notebook

from qlib.errors import UserError
from qlib.report import fill, stitch
from qlib.report.book import collect
from qlib.report.check import check_html
from qlib.report.render import _attach, convert, render

OPENING = "# About {}\n\nWhat is it, and why {{{{ rtn-int4: quality.accuracy.value }}}}? It took {{{{ duration }}}}."


@pytest.fixture
def lessons(project, make):
    """A lesson that ran, one that failed at first, one that was published, and notebooks of the first two."""
    cpu = project / "reports" / "runs" / "reference-2" / "cpu"
    more = {"params": {"notebook": "lessons/pruning.ipynb"}, "title": {"en": "Old", "zh": ""}}
    done = make.write(cpu / "lesson-pruning", make.record("lesson-pruning", "lesson", {}, **more))
    failed = make.write(cpu / "lesson-combined", {}, state="failed", cause="KeyError: 'x'")
    records = project / "reports" / "published" / "records"
    title = {"title": {"en": "Mixed precision", "zh": ""}}
    content = make.record("lesson-mixed_precision", "lesson", {}, **title)
    make.write(records / "lesson-mixed_precision", content, state="")
    (project / "notebooks" / "lessons").mkdir()
    for family, file in {"pruning": done / "notebook.ipynb", "combined": failed / "failed.ipynb"}.items():
        notebook = make.executed(family, [])
        nbformat.write(notebook, file)
        notebook.cells = [cell for cell in notebook.cells if cell.id != "injected"]
        notebook.cells[0].source = OPENING.format(family)
        if family == "combined":
            notebook.cells[0].source += " Then comes [](#fig-late)."
        nbformat.write(notebook, project / "notebooks" / "lessons" / f"{family}.ipynb")
    return project


def book_of(root):
    return collect(root / "reports" / "runs", root / "reports" / "published", root / "params")


def test_lessons_are_no_strategies(lessons):
    book = book_of(lessons)
    found = {entry.name: entry for entry in book.entries if entry.family == "lesson"}
    assert set(found) == {"lesson-pruning", "lesson-combined", "lesson-mixed_precision"}
    assert not set(found) & {entry.name for entry in book.strategies}
    assert found["lesson-combined"] in book.failures


def test_the_list_of_lessons(lessons):
    book = book_of(lessons)

    def source(entry):
        file = lessons / "notebooks" / "lessons" / f"{entry.name.removeprefix('lesson-')}.ipynb"
        return nbformat.read(file, 4) if file.is_file() else None

    section = new_markdown_cell("# Report\n\n## Lessons", metadata={"tags": ["lessons"]})
    steps = [stitch.insert_lessons(book, source), stitch.fill_placeholders(fill.book_words(book), "x")]
    page = convert(new_notebook(cells=[section]), steps, {}, "x")
    items = re.findall(r"<li>(<strong>.*?)</li>", page, re.DOTALL)
    linked = '<strong><a href="notebooks/lesson-{0}.html">About {0}</a></strong> ({1}). What is it, and why 90.5'
    assert [item.startswith(start) for item, start in zip(items, (
        linked.format("combined", "failed"),
        "<strong>Mixed precision</strong> (published, took 1 min 23 s).",
        linked.format("pruning", "took 1 min 23 s"),
    ), strict=True)] == [True] * 3, items  # fmt: skip
    assert "It took" not in page  # only the first sentence
    assert 'aria-label="Failure of lesson-combined"' in page and "qlib run lesson-combined" in page
    empty = convert(new_notebook(cells=[section]), [stitch.insert_lessons(book_of(lessons / "none"), source)], {}, "x")
    assert "No lesson has been run yet." in empty


def test_the_page_of_a_lesson_has_current_prose(lessons):
    book, target = book_of(lessons), lessons / "reports" / "index.html"
    page = target.parent / "notebooks" / "lesson-pruning.html"

    def attach():
        _attach(lessons, book, book.get("lesson-pruning"), target)
        return page.read_text()

    text = attach()
    assert "About pruning" in text and "why 90.5" in text and "It took 1 min 23 s." in text
    assert "Old prose" not in text and "never stitched" in text and '<a href="../index.html">' in text
    assert [problem for problem in check_html(page) if "leads to no file" not in problem] == []

    stamp = page.stat().st_mtime_ns
    attach()
    assert page.stat().st_mtime_ns == stamp
    source = lessons / "notebooks" / "lessons" / "pruning.ipynb"
    source.write_text(source.read_text().replace("What is it", "What was it"))
    assert "What was it" in attach()
    source.write_text(source.read_text().replace("duration", "durations"))
    with pytest.raises(UserError, match="notebooks/lessons/pruning.ipynb: cell about: placeholder '{{ durations }}'"):
        attach()


def test_the_report_links_to_its_lessons(lessons):
    reports = lessons / "reports"
    page = render(lessons, reports / "runs", reports / "published", reports / "index.html")
    text = page.read_text()
    assert check_html(page) == [] and 'href="notebooks/lesson-pruning.html"' in text and 'href="#lessons"' in text
    assert "Then comes what this run did not reach." in (reports / "notebooks" / "lesson-combined.html").read_text()
