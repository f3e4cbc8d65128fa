"""Lessons: notebooks that teach one family each. They measure nothing, run after their family, may read its records."""

import ast
import json
import re
from pathlib import Path
from typing import Any, Iterable, Mapping

from qlib.errors import UserError
from qlib.params import Strategy, Title, to_dict
from qlib.paths import slug
from qlib.record import FORMAT
from qlib.runs.injection import parameters_cell
from qlib.runs.provenance import device_class

__all__ = [
    "LESSON", "find_lessons", "read_lesson", "is_lesson", "notebook_of", "taught", "reads", "result_of", "heading",
    "opening",
]  # fmt: skip

#: The family of all lessons, and the beginning of their names: `lesson-pruning` is notebooks/lessons/pruning.ipynb.
LESSON = "lesson"
FOLDER = "lessons"
#: Every lesson may compare with it.
ALWAYS = "baseline"
#: Families that a lesson sets beside its own: all methods meet on one axis.
MEETS = {"weight_quantization": ("mixed_precision", "tool"), "pruning": ("finetuning", "combined"), "tool": ("weight_quantization",)}
SENTENCE = re.compile(r"(.+?[.?!])(?=\s+[^\sa-z]|$)", re.DOTALL)


def find_lessons(root: Path) -> list[Strategy]:
    """All lessons of a project, by name.

    Raises:
        UserError: a lesson that cannot be read.
    """
    return [read_lesson(file) for file in sorted((root / "notebooks" / FOLDER).glob("*.ipynb"))]


def read_lesson(notebook: Path) -> Strategy:
    """A lesson as the runner takes it: like a strategy, with the values of its own parameters cell.

    Raises:
        UserError: the file is no notebook, or its parameters are no constants.
    """
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        tree = ast.parse(parameters_cell(notebook))
        given = {node.target.id: ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.AnnAssign)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SyntaxError):
        raise UserError(f"{notebook}: is not a lesson that can be read") from None
    return Strategy(
        name=f"{LESSON}-{notebook.stem}",
        title=Title(heading(cells) or notebook.stem, ""),
        family=LESSON,
        tier="core",
        notebook=f"{FOLDER}/{notebook.name}",
        **{name: value for name, value in given.items() if name in ("model", "seed")},
    )


def is_lesson(strategy: Strategy) -> bool:
    return strategy.family == LESSON


def notebook_of(name: str) -> str:
    """Where the lesson called `name` lies below notebooks/."""
    return f"{FOLDER}/{name.removeprefix(f'{LESSON}-')}.ipynb"


def taught(lesson: Strategy) -> str:
    """The family that a lesson is about."""
    return Path(lesson.notebook).stem


def reads(job: Strategy, family: str) -> bool:
    """True if `job` is a lesson that may read the records of `family`."""
    return is_lesson(job) and family in (taught(job), ALWAYS, *MEETS.get(taught(job), ()))


def result_of(lesson: Strategy) -> dict[str, Any]:
    """What stands in a lesson's record in the place of a notebook's result; the runner adds the rest."""
    params = to_dict(lesson)
    about = {name: params[name] for name in ("name", "title", "family", "tier")}
    where = {"model": slug(lesson.model), "device": device_class()}
    return {"format": FORMAT} | about | where | {"params": params, "measurements": {}}


def heading(cells: Iterable[Mapping[str, Any]]) -> str:
    """The text of the first ``# heading`` of a notebook's cells, empty if there is none."""
    lines = (line for cell in cells if cell["cell_type"] == "markdown" for line in _text(cell).splitlines())
    return next((line[2:].strip() for line in lines if line.startswith("# ")), "")


def opening(cells: Iterable[Mapping[str, Any]]) -> str:
    """The first sentence after the first heading, as Markdown on one line."""
    prose = "\n\n".join(_text(cell) for cell in cells if cell["cell_type"] == "markdown")
    _, _, below = prose.partition("# ")
    blocks = [" ".join(block.split()) for block in below.partition("\n")[2].split("\n\n")]
    paragraph = next((block for block in blocks if block and not block.startswith("#")), "")
    first = SENTENCE.match(paragraph)
    return first[1] if first else paragraph


def _text(cell: Mapping[str, Any]) -> str:
    return "".join(cell["source"])
