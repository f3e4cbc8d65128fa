"""Build the report: execute its notebook if something it reads changed, and convert it to one offline page."""

import hashlib
import json
import os
import re
import tempfile
from pathlib import Path

from qlib.errors import UserError
from qlib.paths import write_atomic
from qlib.report.book import Book, Entry, collect, sources
from qlib.report.check import check_html
from qlib.runs.lessons import LESSON, heading, notebook_of

__all__ = ["render", "report_key", "convert"]

HERE = Path(__file__).parent
EXECUTION_LIMIT = 600  # seconds a cell of the report may take

#: Where an environment keeps its packages, wherever that is.
PACKAGES = re.compile(r"[^\s\"'<>();=]*/site-packages/")


def render(root: str | Path, runs: str | Path, published: str | Path, target: str | Path) -> Path:
    """Write the report to `target` and every executed notebook as a page to the folder ``notebooks`` beside it.

    Args:
        root: the project, which holds ``notebooks/report.ipynb`` and ``params/``.
        runs: folder of runs; the executed report is kept in its ``cache/report``.
        published: folder of published records.
        target: the page, usually ``reports/index.html``.

    Returns:
        `target`.

    Raises:
        UserError: a placeholder or reference is unknown, a cell of the report fails, or the page would break one of
            the rules of `check_html`.
    """
    from qlib.report import fill, stitch
    from qlib.report.printed import fold_kept

    root, runs, published, target = (Path(p).resolve() for p in (root, runs, published, target))
    target.parent.mkdir(parents=True, exist_ok=True)
    source = root / "notebooks" / "report.ipynb"
    executed = _execute(root, source, runs, published)
    book = collect(runs, published, root / "params")
    for entry in book.entries:
        if entry.notebook:
            _attach(root, book, entry, target)
        elif entry.kept_page:
            page, file = fold_kept(entry.kept_page.read_text(encoding="utf-8")), target.parent / book.page(entry)
            file.parent.mkdir(exist_ok=True)
            write_atomic(file, page.replace('"../index.html"', f'"../{target.name}"'))

    def current(entry: Entry):
        return _read(file) if (file := _source(root, entry)).is_file() else None

    steps = [
        stitch.strip_banners,
        stitch.current_prose(_read(source)),
        stitch.insert_strategies(book),
        stitch.insert_lessons(book, current),
        stitch.fill_placeholders(fill.book_words(book), "notebooks/report.ipynb"),
    ]
    html = convert(_read(executed), steps, {"code": False}, "notebooks/report.ipynb")
    return _write(target, _without(root, html))


def _without(root: Path, html: str) -> str:
    """Paths in tracebacks and in what tools print, as they are seen from the project: a page names no machine's folders."""
    return PACKAGES.sub("", html.replace(f"{root}/", "")).replace(f"{Path.home()}/", "~/")


def convert(notebook, steps: list, page: dict, where: str) -> str:
    """Convert a notebook to a page with our template.

    Args:
        steps: preprocessors, applied in order.
        page: what the template is told: `code` (shown at first?), `home` (link to the report), `key`, and `partial`:
            the notebook stopped half-way.
        where: names the notebook in messages.
    """
    from qlib.report.export import Page
    from qlib.report.structure import finish

    exporter = Page()
    for step in steps:
        exporter.register_preprocessor(step, enabled=True)
    html, _ = exporter.from_notebook_node(notebook, {"page": {"title": heading(notebook.cells) or where, **page}})
    return finish(html, where, page.get("partial", False))


def report_key(source: Path, runs: Path, published: Path, params: Path) -> str:
    """Key of the executed report: its code, every record and status, the strategy files and the report's own source."""
    cells = [[cell.source, cell.metadata.get("tags", [])] for cell in _read(source).cells if cell.cell_type == "code"]
    files = [*sources(runs, published), *sorted(params.glob("*.yaml")), *sorted(HERE.glob("*.py"))]
    digests = [[str(file), hashlib.sha256(file.read_bytes()).hexdigest()] for file in files]
    return hashlib.sha256(json.dumps([cells, digests, str(runs), str(published)]).encode()).hexdigest()


def _execute(root: Path, source: Path, runs: Path, published: Path) -> Path:
    """The executed copy of the report's notebook; nothing runs if its key is unchanged."""
    folder = runs / "cache" / "report"
    executed, stamp = folder / "report.ipynb", folder / "key.txt"
    key = report_key(source, runs, published, root / "params")
    if executed.is_file() and stamp.is_file() and stamp.read_text(encoding="utf-8") == key:
        return executed
    folder.mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)
    _papermill(root, source, executed, {"runs": _near(runs, root), "published": _near(published, root)})
    write_atomic(stamp, key)
    return executed


def _papermill(root: Path, source: Path, executed: Path, parameters: dict[str, str]) -> None:
    import papermill
    from papermill.exceptions import PapermillExecutionError

    from qlib.runs.kernel import Kernel

    partial = executed.with_name("running.ipynb")
    with tempfile.TemporaryDirectory() as folder:
        path = os.pathsep.join(filter(None, (str(HERE.parent.parent), os.environ.get("PYTHONPATH"))))
        kernel = Kernel(Path(folder), root, {"PYTHONPATH": path})
        try:
            papermill.execute_notebook(
                _braced(source),
                _braced(partial),
                parameters,
                kernel_name="python3",
                kernel_manager_class=kernel.manager_class(),
                progress_bar=False,
                execution_timeout=EXECUTION_LIMIT,
            )
        except PapermillExecutionError as error:
            raise UserError(
                f"{source.name}: cell {error.cell_index} failed: {error.ename}: {error.evalue}; see {partial}"
            ) from None
        finally:
            kernel.end()
    os.replace(partial, executed)


def _braced(path: Path) -> str:
    """papermill formats the paths it is given, so that a brace in a folder's name must be doubled."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _attach(root: Path, book: Book, entry: Entry, target: Path) -> None:
    """Write an executed notebook as a page, unless the page there was made from the very same things."""
    from qlib.report import fill, stitch
    from qlib.report.printed import fold_printed

    file = target.parent / book.page(entry)
    source = _source(root, entry)
    inputs = [entry.notebook, *sorted(HERE.glob("*.py")), *sorted((HERE / "template").iterdir())]
    inputs += [source] if source.is_file() else []
    others = [e.record for e in book.entries] if entry.family == LESSON else []  # its prose may name any of them
    digest = hashlib.sha256(json.dumps([entry.record, entry.state, target.name, others]).encode())
    for path in inputs:
        digest.update(path.read_bytes())
    key = digest.hexdigest()
    if file.is_file() and key in file.read_text(encoding="utf-8")[:2000]:
        return
    steps = [stitch.strip_banners, fold_printed]
    steps += [stitch.current_prose(_read(source))] if source.is_file() else []
    where = str(source.relative_to(root)) if source.is_file() else entry.name
    resolve = fill.lesson_words(book, entry) if entry.family == LESSON else fill.entry_words(entry)
    steps.append(stitch.fill_placeholders(resolve, where))
    file.parent.mkdir(exist_ok=True)
    page = {"code": True, "home": f"../{target.name}", "key": key, "partial": entry.failed}
    _write(file, _without(root, convert(_read(entry.notebook), steps, page, where)), alone=True)


def _source(root: Path, entry: Entry) -> Path:
    """The present notebook of an entry; of a lesson that left no record its name tells which."""
    default = notebook_of(entry.name) if entry.family == LESSON else ""
    return root / "notebooks" / str(entry.params.get("notebook") or default)


def _write(file: Path, html: str, alone: bool = False) -> Path:
    """Check a page, then put it in place in one step.

    Args:
        alone: the page that it links to is not written yet.
    """
    draft = file.with_name(f".{file.name}.draft")
    try:
        write_atomic(draft, html)
        problems = [p for p in check_html(draft) if not (alone and p.endswith("leads to no file"))]
        if problems:
            more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
            raise UserError(f"{file.name}: {'; '.join(problems[:5])}{more}")
        os.replace(draft, file)
    finally:
        draft.unlink(missing_ok=True)
    return file


def _read(file: Path):
    import nbformat

    return nbformat.read(file, as_version=4)


def _near(path: Path, root: Path) -> str:
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)
