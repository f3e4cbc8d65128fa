"""What programs print while a notebook runs: kept on its page, but folded where it would bury the results.

A preprocessor of nbconvert. Warnings of libraries (stderr) are folded always, long output otherwise, and a progress bar is
shown as it stood at last. What a cell printed before it failed stays open.
"""

import re
from itertools import groupby

import nbformat
from nbconvert.filters import ansi2html
from nbformat import NotebookNode

__all__ = ["fold_kept", "fold_printed"]

SHORT = 40  # lines of ordinary output that are shown openly
#: Boxes of stderr, one after the other, on a page that was rendered before they were folded.
OPEN = re.compile(r'(?:<pre class="out err"[^>]*>.*?</pre>\s*)+', re.DOTALL)
BETWEEN = re.compile(r'</pre>\s*<pre class="out err"[^>]*>|^<pre class="out err"[^>]*>|</pre>\s*$')


def fold_printed(notebook: NotebookNode, resources: dict) -> tuple[NotebookNode, dict]:
    """Fold what each cell printed, if it is long or a warning, at the place where it stood."""
    for cell in notebook.cells:
        outputs = cell.get("outputs", [])
        if any(output.output_type == "error" for output in outputs):
            continue
        long = sum(len(_lines(output)) for output in outputs if _is(output, "stdout")) > SHORT
        parts = []
        for folded, group in groupby(outputs, lambda one: _is(one, "stderr") or (long and _is(one, "stdout"))):
            parts += [_folded(list(group))] if folded else group
        if outputs:
            cell.outputs = [part for part in parts if part is not None]
    return notebook, resources


def _is(output: NotebookNode, name: str) -> bool:
    return output.output_type == "stream" and output.name == name


def _lines(output: NotebookNode) -> list[str]:
    """Lines as a terminal would show them: what follows a carriage return replaces what stood before it."""
    text = "".join(output.text).replace("\r\n", "\n")
    shown = [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n")]
    return [line for line in shown if line]


def _folded(outputs: list[NotebookNode]) -> NotebookNode | None:
    """One closed box for consecutive outputs; None if they hold nothing to see."""
    lines = [line for output in outputs for line in _lines(output)]
    if not lines:
        return None
    html = _box(len(lines), ansi2html("\n".join(lines)))
    return nbformat.v4.new_output("display_data", {"text/html": html}, metadata={"bare": True})


def _box(count: int, told: str) -> str:
    lines = f"{count} line{'' if count == 1 else 's'}"
    return (
        f'<details class="log"><summary>Printed while this ran: {lines}</summary>'
        f'<pre class="out" tabindex="0">{told}</pre></details>\n'
    )


def fold_kept(html: str) -> str:
    """Fold warnings on the finished page of a run that succeeded, whose notebook is not here any more."""

    def fold(found: re.Match) -> str:
        lines = [line for line in BETWEEN.sub("", found[0]).split("\n") if line.strip()]
        return _box(len(lines), "\n".join(lines))

    return OPEN.sub(fold, html)
