"""The report's notebook is clean in git and written as the style asks."""

import re
import statistics
from pathlib import Path

import nbformat

NOTEBOOK = nbformat.read(Path(__file__).resolve().parents[2] / "notebooks" / "report.ipynb", as_version=4)
CODE = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
PROSE = [cell for cell in NOTEBOOK.cells if cell.cell_type == "markdown"]


def test_nothing_of_a_run_is_left_in_it():
    nbformat.validate(NOTEBOOK)
    assert all(not cell.outputs and cell.execution_count is None for cell in CODE)
    assert "papermill" not in NOTEBOOK.metadata and NOTEBOOK.metadata.kernelspec.name == "python3"
    assert all(re.fullmatch(r"[a-z-]+", cell.id) for cell in NOTEBOOK.cells)


def test_it_is_short_and_opens_as_it_should():
    lengths = [len(cell.source.splitlines()) for cell in CODE]
    assert statistics.median(lengths) <= 6 and max(lengths) <= 20
    assert NOTEBOOK.cells[0].source.startswith("# ") and "{{ finding }}" in NOTEBOOK.cells[0].source
    prose = re.sub("```.*?```", "", "\n".join(cell.source for cell in PROSE), flags=re.S)
    assert len(re.findall("^# ", prose, flags=re.M)) == 1
    assert CODE[0].metadata.tags == ["parameters"]
    assert all(line.count("=") == 1 for line in CODE[0].source.splitlines())


def test_no_measured_number_is_typed_by_hand():
    for cell in PROSE:
        prose = re.sub(r"\{\{.*?\}\}|```.*?```|`.*?`", "", cell.source, flags=re.S)
        assert not re.search(r"\d+\.\d", prose), cell.id
