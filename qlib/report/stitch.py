"""What is done to an executed notebook before it becomes a page: current prose, numbers in words, sections inserted.

All are nbconvert preprocessors: functions of notebook and resources that return both.
"""

import re
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Callable

import nbformat
from nbformat import NotebookNode

from qlib.progress import clock
from qlib.report.book import Book, Entry
from qlib.report.fill import escape as plain
from qlib.report.fill import fill, lesson_words
from qlib.report.html import slug
from qlib.report.measures import family_label
from qlib.report.quantized import arranged
from qlib.report.show import summary
from qlib.report.structure import scope_ids
from qlib.report.tables import rerun
from qlib.report.words import verdict
from qlib.runs.lessons import LESSON, heading, opening

__all__ = ["current_prose", "strip_banners", "fill_placeholders", "insert_strategies", "insert_lessons", "tags"]

Preprocessor = Callable[[NotebookNode, dict], tuple[NotebookNode, dict]]
BANNER = "papermill-error-cell-tag"
STITCHED = ("summary", "figure")
#: A figure of a finished page, and the number that it has there.
FIGURE = re.compile(r'<figure class="fig" id="([^"]+)">.*?</figure>', re.DOTALL)
NUMBERED = re.compile(r'<span class="number">[^<]*</span> ?')


def tags(cell: NotebookNode) -> list[str]:
    """The tags of a cell."""
    return list(cell.get("metadata", {}).get("tags", []))


def strip_banners(notebook: NotebookNode, resources: dict) -> tuple[NotebookNode, dict]:
    """Remove the two cells that papermill writes into a notebook that failed; the report has a box of its own."""
    notebook.cells = [cell for cell in notebook.cells if BANNER not in tags(cell)]
    return notebook, resources


def current_prose(source: NotebookNode) -> Preprocessor:
    """Take Markdown from the source notebook, so that editing prose needs no execution.

    Where both notebooks hold the same code cells, the source's order and its new Markdown cells count as well;
    otherwise the executed notebook's order is kept and Markdown is replaced cell by cell.
    """

    def update(notebook: NotebookNode, resources: dict) -> tuple[NotebookNode, dict]:
        current = {cell.get("id"): cell for cell in source.cells}
        executed = {cell.get("id"): cell for cell in notebook.cells if cell.cell_type == "code"}
        injected = [cell for cell in notebook.cells if "injected-parameters" in tags(cell)]
        own = set(executed) - {cell.get("id") for cell in injected}
        if own == {cell.get("id") for cell in source.cells if cell.cell_type == "code"}:
            cells = []
            for cell in source.cells:
                cells.append(executed.get(cell.get("id"), cell))
                cells += injected if "parameters" in tags(cell) else []
        else:
            cells = [
                current.get(cell.get("id"), cell) if cell.cell_type == "markdown" else cell for cell in notebook.cells
            ]
        notebook.cells = [NotebookNode(cell) for cell in cells]
        return notebook, resources

    return update


def fill_placeholders(resolve: Callable[[str], str], name: str) -> Preprocessor:
    """Fill the placeholders of all Markdown cells; an unknown one raises a UserError that names it and its cell."""

    def update(notebook: NotebookNode, resources: dict) -> tuple[NotebookNode, dict]:
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = fill(cell.source, resolve, f"{name}: cell {cell.get('id', '?')}")
        return notebook, resources

    return update


def insert_strategies(book: Book) -> Preprocessor:
    """Insert a folded section per strategy, under the name of its family, after the cell tagged ``strategies``."""

    def update(notebook: NotebookNode, resources: dict) -> tuple[NotebookNode, dict]:
        cells = []
        for cell in notebook.cells:
            cells.append(cell)
            if "strategies" in tags(cell):
                for family, entries in groupby(arranged(list(book.strategies)), key=lambda entry: entry.family):
                    title = f'<h3 id="strategies-{slug(family)}">{escape(family_label(family))}</h3>'
                    cells += [_html_cell(title), *(part for entry in entries for part in _section(book, entry))]
        notebook.cells = cells
        return notebook, resources

    return update


def insert_lessons(book: Book, source: Callable[[Entry], NotebookNode | None]) -> Preprocessor:
    """List the lessons after the cell tagged ``lessons``: title, first sentence, time, and what went wrong.

    Args:
        source: the present notebook of a lesson, None if there is none any more.
    """

    def update(notebook: NotebookNode, resources: dict) -> tuple[NotebookNode, dict]:
        cells, lessons = [], [entry for entry in book.entries if entry.family == LESSON]
        for cell in notebook.cells:
            cells.append(cell)
            if "lessons" in tags(cell):
                lines = [_lesson(book, entry, source(entry)) for entry in lessons]
                cells.append(nbformat.v4.new_markdown_cell("\n".join(lines) or "No lesson has been run yet."))
                cells += [_html_cell(_failure(entry)) for entry in lessons if entry.failed]
        notebook.cells = cells
        return notebook, resources

    return update


def _lesson(book: Book, entry: Entry, source: NotebookNode | None) -> str:
    """One point of the list, in Markdown."""
    cells = source.cells if source else []
    title, page, seconds = plain(heading(cells) or entry.title), book.page(entry), entry.record.get("duration_seconds")
    facts = [] if entry.state == "done" else [entry.state]
    facts += [f"{entry.model} on {entry.device}"] if entry is not book.get(entry.name) else []
    facts += [f"took {clock(seconds)}"] if seconds else []
    link = f"[{title}]({page})" if page else title
    told = f" ({plain(', '.join(facts))})" if facts else ""
    return f"- **{link}**{told}. {fill(opening(cells), lesson_words(book, entry), entry.name)}"


def _section(book: Book, entry: Entry) -> list[NotebookNode]:
    """Heading and recipe, the outputs its notebook is tagged for, and what went wrong if something did.

    All but the heading is folded away, to be unfolded by a click or by who follows a link to it.
    """
    parts, own = [_html_cell(_opening(book, entry), bare=True)], book.anchor(entry).removeprefix("strategy-")
    if entry.failed:
        parts.append(_html_cell(_failure(entry)))
    outputs = _tagged(entry.notebook) if entry.notebook and not entry.failed else []
    if outputs:
        for output in outputs:
            if "text/html" in output.get("data", {}):
                output.data["text/html"] = scope_ids(output.data["text/html"], own)
        parts.append(_cell(outputs))
    elif entry.measurements:
        figures = _kept_figures(entry.kept_page) if entry.kept_page else []
        shown = [*figures, summary(entry.record)._repr_html_()]
        parts += [_html_cell(scope_ids(html, own)) for html in shown]
    return [*parts, _html_cell("</details>", bare=True)]


def _tagged(file: Path) -> list[NotebookNode]:
    """The outputs of the cells tagged ``summary`` or ``figure`` of an executed notebook, without empty figures."""
    notebook = nbformat.read(file, as_version=4)
    wanted = [cell for cell in notebook.cells if cell.cell_type == "code" and set(tags(cell)) & set(STITCHED)]
    shown = (out for cell in wanted for out in cell.outputs if out.output_type in ("display_data", "execute_result"))
    return [out for out in shown if not _is_empty(out.get("data", {}).get("text/html", ""))]


def _kept_figures(page: Path) -> list[str]:
    """The figures of a finished page, to be numbered anew: of a published record there is no executed notebook."""
    found = FIGURE.finditer(page.read_text(encoding="utf-8"))
    return [NUMBERED.sub(f'<span class="number" data-ref="{one[1]}"></span>', one[0], count=1) for one in found]


def _is_empty(html: str) -> bool:
    """Whether it is a figure with nothing drawn, or with no data behind it."""
    return "<figure" in html and ("<svg" not in html or "<tbody></tbody>" in html)


def _cell(outputs: list[NotebookNode]) -> NotebookNode:
    cell = nbformat.v4.new_code_cell("", outputs=outputs)
    cell.metadata["transient"] = {"remove_source": True}
    return cell


def _html_cell(html: str, bare: bool = False) -> NotebookNode:
    """A cell that shows HTML.

    Args:
        bare: without a frame of its own, as it is not balanced.
    """
    return _cell([nbformat.v4.new_output("display_data", {"text/html": html}, metadata={"bare": bare})])


def _opening(book: Book, entry: Entry) -> str:
    import yaml

    other = entry.record.get("title") or entry.params.get("title") or {}
    chinese = other.get("zh") if isinstance(other, dict) else ""
    chinese = f' <span class="note" lang="zh">{escape(str(chinese))}</span>' if chinese else ""
    facts = [f'<span class="key {escape(entry.family)}"></span> <code>{escape(entry.name)}</code>']
    facts.append(escape(f"{entry.model} on {entry.device}"))
    facts.append(f'<span class="state {escape(entry.state)}">{escape(entry.label)}</span>')
    recipe = entry.params.get("recipe")
    recipe = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True) if recipe else "# empty: the model as it is\n"
    page = book.page(entry)
    steps = "shows how far it got" if entry.failed else "shows every step"
    link = f' <a href="{escape(page)}">The executed notebook</a> {steps}.' if page else ""
    words = "" if entry.family == "baseline" or not entry.measurements else f"It {verdict(book, entry)}."
    return (
        f'<details class="strategy print"><summary><h4 id="{book.anchor(entry)}">{escape(entry.title)}{chinese}</h4>'
        f'<span class="about">{" · ".join(facts)}</span></summary><p>{escape(words)}{link}</p>'
        f'<pre class="recipe" tabindex="0" aria-label="Recipe of {escape(entry.name)}">'
        f"<code>{escape(recipe)}</code></pre>"
    )


def _failure(entry: Entry) -> str:
    """A labelled box: cause, cell, last lines, and how to run just this again."""
    status = entry.status
    cell = status.get("cell") if isinstance(status.get("cell"), dict) else {}
    rows = [("Cause", escape(str(status.get("cause") or "no cause was recorded")))]
    if cell:
        where = escape(f"cell {cell.get('index', '?')} ({cell.get('id', '?')})")
        rows.append(("Where", f"{where}<pre><code>{escape(str(cell.get('source') or ''))}</code></pre>"))
    if status.get("last_lines"):
        lines = escape("\n".join(map(str, status["last_lines"])))
        rows.append(("Last lines", f"<pre><code>{lines}</code></pre>"))
    rows.append(("Run just this", f"<code>{escape(rerun(entry))}</code>"))
    body = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in rows)
    titles = {"timeout": "Ran out of time", "crashed": "Crashed", "interrupted": "Interrupted"}
    name, title = escape(entry.name), titles.get(entry.state, "Failed")
    return (
        f'<div class="failure" role="group" aria-label="Failure of {name}">'
        f"<p><strong>{title}: {name}</strong></p><dl>{body}</dl></div>"
    )
