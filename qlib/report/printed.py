"""What programs print while a notebook runs: kept on its page, but folded where it would bury the results.

A preprocessor of nbconvert. Warnings of libraries (stderr) are folded always, long output otherwise, and a progress bar is
shown as it stood at last. What a cell printed before it failed stays open.
"""

from itertools import groupby

import nbformat
from nbconvert.filters import ansi2html
from nbformat import NotebookNode

__all__ = ["fold_printed"]

SHORT = 40  # lines of ordinary output that are shown openly


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
    count = f"{len(lines)} line{'' if len(lines) == 1 else 's'}"
    told = ansi2html("\n".join(lines))
    html = (
        f'<details class="log"><summary>Printed while this ran: {count}</summary>'
        f'<pre class="out" tabindex="0">{told}</pre></details>'
    )
    return nbformat.v4.new_output("display_data", {"text/html": html}, metadata={"bare": True})
