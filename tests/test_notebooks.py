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

from qlib.params import Strategy, from_dict
from qlib.runs.imports import verbs_of
from qlib.runs.injection import parameters_cell

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").rglob("*.ipynb"))
#: Parameters whose value in a notebook is an example that a strategy file replaces; others are the schema's defaults.
EXAMPLES = ("name", "title", "family", "tier", "notebook", "model", "recipe", "formats")
SPEED_ONLY = ("formats", "prompt_tokens", "context_tokens", "rounds")
REPORT = "report.ipynb"


def code_of(notebook: Path) -> list[str]:
    return [cell.source for cell in nbformat.read(notebook, 4).cells if cell.cell_type == "code"]


def runs_a_strategy(notebook: Path) -> bool:
    return "start" in verbs_of(ast.parse("\n".join(code_of(notebook))))


def named(notebooks: list[Path]) -> Any:
    return pytest.mark.parametrize("notebook", notebooks, ids=[file.stem for file in notebooks])


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
    prose = [cell.source for cell in cells if cell.cell_type == "markdown"]
    unfenced = [re.sub(r"```.*?```", "", text, flags=re.DOTALL) for text in prose]
    assert sum(len(re.findall(r"^# ", text, re.MULTILINE)) for text in unfenced) == 1, "one h1"
    first = next(index for index, cell in enumerate(cells) if cell.cell_type == "code")
    opening = " ".join(cell.source for cell in cells[:first]).partition("\n")[2]
    assert len(opening.split()) >= 15, "a paragraph: the question, the answer, time and memory"
    assert "parameters" in cells[first].metadata.get("tags", []), "the first code cell holds the parameters"
    assert cells[first + 1].cell_type == "code" and "import" in cells[first + 1].source, "then comes the setup"


@named(NOTEBOOKS)
def test_short_plain_cells(notebook):
    sources = code_of(notebook)
    lines = sorted(sum(bool(line.strip()) for line in source.splitlines()) for source in sources)
    assert statistics.median(lines) <= 6
    assert lines[math.ceil(0.9 * len(lines)) - 1] <= 20
    assert lines[-1] <= 30
    for source in sources:
        tree = ast.parse(source)  # magics and shell escapes are no Python
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
    optional = () if values["family"] == "speed" else SPEED_ONLY
    assert set(hints) - set(given) <= set(optional)
    for field in fields(Strategy):
        if field.name not in given:
            continue
        assert ast.unparse(given[field.name].annotation) == kind_of(hints[field.name]), field.name
        if field.name not in EXAMPLES:
            default = field.default if field.default is not MISSING else field.default_factory()
            assert values[field.name] == (asdict(default) if is_dataclass(default) else default), field.name
    assert from_dict(values, notebook.name).notebook == notebook.name
