"""The notebooks in git: clean, short cells, the agreed opening, and parameters that agree with the schema."""

import ast
import logging
import math
import re
import statistics
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_origin, get_type_hints

import nbformat
import papermill
import pytest

from qlib.params import FAMILIES, Strategy, from_dict
from qlib.report.book import collect
from qlib.report.fill import fill, lesson_words
from qlib.runs.imports import verbs_of
from qlib.runs.injection import parameters_cell
from qlib.runs.lessons import opening

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").rglob("*.ipynb"))
#: Parameters whose value in a notebook is an example that a strategy file replaces; others are the schema's defaults.
EXAMPLES = ("name", "title", "family", "tier", "notebook", "model", "recipe", "formats")
#: Parameters that notebooks of other families may leave out.
ONLY = {name: ("speed", "scale") for name in ("prompt_tokens", "context_tokens", "rounds")}
ONLY |= {"formats": ("speed", "training", "scale"), "training": ("training",)}
REPORT = "report.ipynb"
LESSONS = [file for file in NOTEBOOKS if file.parent.name == "lessons"]
PROSE_PER_LINE = (5, 20)  # words per line of code of a lesson
LONGEST_FUNCTION = 10  # lines, where the function is not the lesson


def code_of(notebook: Path) -> list[str]:
    return [cell.source for cell in nbformat.read(notebook, 4).cells if cell.cell_type == "code"]


def runs_a_strategy(notebook: Path) -> bool:
    return "start" in verbs_of(ast.parse("\n".join(code_of(notebook))))


def named(notebooks: list[Path]) -> Any:
    ids = [str(file.relative_to(ROOT / "notebooks").with_suffix("")) for file in notebooks]
    return pytest.mark.parametrize("notebook", notebooks, ids=ids)


def prose_of(notebook: Path) -> list[str]:
    """Markdown cells without fenced code."""
    cells = [cell.source for cell in nbformat.read(notebook, 4).cells if cell.cell_type == "markdown"]
    return [re.sub(r"```.*?```", "", text, flags=re.DOTALL) for text in cells]


def test_there_are_notebooks():
    assert NOTEBOOKS and any(map(runs_a_strategy, NOTEBOOKS))


@named(NOTEBOOKS)
def test_clean(notebook):
    content = nbformat.read(notebook, 4)
    nbformat.validate(content)
    assert (content.nbformat, content.nbformat_minor >= 5) == (4, True)
    assert content.metadata.kernelspec.name == "python3"
    assert set(content.metadata) <= {"kernelspec", "language_info", "title"}
    ids = [cell.get("id", "") for cell in content.cells]
    assert all(ids) and len(set(ids)) == len(ids)
    for cell in content.cells:
        assert set(cell.metadata) <= {"tags", "lang"}, cell.id
        assert not {"injected-parameters", "raises-exception"} & set(cell.metadata.get("tags", [])), cell.id
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None, cell.id


@named(NOTEBOOKS)
def test_opening(notebook):
    cells = nbformat.read(notebook, 4).cells
    assert cells[0].cell_type == "markdown" and cells[0].source.startswith("# ")
    assert sum(len(re.findall(r"^# ", text, re.MULTILINE)) for text in prose_of(notebook)) == 1, "one h1"
    first = next(index for index, cell in enumerate(cells) if cell.cell_type == "code")
    paragraph = " ".join(cell.source for cell in cells[:first]).partition("\n")[2]
    assert len(paragraph.split()) >= 15, "a paragraph: the question, the answer, time and memory"
    assert "parameters" in cells[first].metadata.get("tags", []), "the first code cell holds the parameters"
    assert cells[first + 1].cell_type == "code" and "import" in cells[first + 1].source, "then comes the setup"


@named(NOTEBOOKS)
def test_short_plain_cells(notebook):
    sources = code_of(notebook)
    lines = sorted(sum(bool(line.strip()) for line in source.splitlines()) for source in sources)
    assert lines[-1] <= 30
    if notebook not in LESSONS:
        assert statistics.median(lines) <= 6
        assert lines[math.ceil(0.9 * len(lines)) - 1] <= 20
    for source in sources:
        tree = ast.parse(source)  # magics and shell escapes are no Python
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        long = [f.name for f in functions if f.end_lineno - f.lineno >= LONGEST_FUNCTION]
        assert notebook in LESSONS or not long, "belongs into qlib/"
        values = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        texts = [value for value in values if isinstance(value, str)]
        assert not [text for text in texts if re.match(r"(/|~/|[A-Za-z]:\\)\w", text)], "no absolute paths"


@named([file for file in NOTEBOOKS if file.name != REPORT])
def test_papermill_understands_every_parameter(notebook, caplog):
    with caplog.at_level(logging.WARNING):
        found = papermill.inspect_notebook(str(notebook))
    tree = ast.parse(parameters_cell(notebook))
    assert all(isinstance(node, ast.AnnAssign) for node in tree.body), "name: type = value  # help"
    assert set(found) == {node.target.id for node in tree.body} and not caplog.records
    for node in tree.body:
        assert ast.unparse(node.annotation) in ("int", "float", "bool", "str", "list", "dict"), node.target.id
        assert found[node.target.id]["help"], f"{node.target.id} has no help"
        ast.literal_eval(node.value)  # constants only: derived values would not follow what is injected


def kind_of(hint: Any) -> str:
    if is_dataclass(hint):
        return "dict"
    return "str" if get_origin(hint) is Literal else (get_origin(hint) or hint).__name__


@named([file for file in NOTEBOOKS if runs_a_strategy(file)])
def test_parameters_agree_with_the_schema(notebook):
    given = {node.target.id: node for node in ast.parse(parameters_cell(notebook)).body}
    values = {name: ast.literal_eval(node.value) for name, node in given.items()}
    hints = get_type_hints(Strategy)
    assert set(given) <= set(hints)
    assert set(hints) - set(given) <= {name for name, families in ONLY.items() if values["family"] not in families}
    for field in fields(Strategy):
        if field.name not in given:
            continue
        assert ast.unparse(given[field.name].annotation) == kind_of(hints[field.name]), field.name
        if field.name not in EXAMPLES:
            default = field.default if field.default is not MISSING else field.default_factory()
            assert values[field.name] == (asdict(default) if is_dataclass(default) else default), field.name
    assert from_dict(values, notebook.name).notebook == notebook.name


@named(LESSONS)
def test_lesson_takes_a_model_and_a_seed_and_records_nothing(notebook):
    assert notebook.stem in FAMILIES
    lines = [line.partition("#")[0].rstrip() for line in parameters_cell(notebook).splitlines()]
    assert lines == ['model: str = "reference-2"', "seed: int = 0"]
    assert not {"start", "record"} & set(verbs_of(ast.parse("\n".join(code_of(notebook)))))


@named(LESSONS)
def test_lesson_explains_its_code(notebook):
    words = sum(len(text.split()) for text in prose_of(notebook))
    lines = sum(bool(line.strip()) for source in code_of(notebook) for line in source.splitlines())
    assert PROSE_PER_LINE[0] <= words / lines <= PROSE_PER_LINE[1]


@named(LESSONS)
def test_the_report_can_announce_the_lesson(notebook, tmp_path):
    cells = nbformat.read(notebook, 4).cells
    assert 5 <= len(opening(cells).split()) <= 60, "the first sentence stands in the report"
    assert "[](" not in opening(cells), "a reference leads to nothing there"
    book = collect(tmp_path / "none", tmp_path / "none", ROOT / "params")
    for text in prose_of(notebook):
        fill(text, lesson_words(book, None), notebook.name)  # an unknown placeholder raises
