"""Notebooks and strategy files of a small project: each notebook ends in its own way, and none costs anything."""

from pathlib import Path
from typing import Any

import nbformat
import numpy as np
from safetensors.numpy import save_file

import qlib
from qlib.record import REQUIRED, UNITS

PACKAGE = Path(qlib.__file__).parent


def write_weights(folder: Path, *values: float) -> None:
    """A safetensors file with one tensor."""
    save_file({"weight": np.array(values, dtype=np.float32)}, folder / "model.safetensors")


PARAMETERS = """name: str = "plain"
title: dict = {"en": "Plain", "zh": "普通"}
family: str = "baseline"
tier: str = "core"
notebook: str = "plain.ipynb"
model: str = "model"
recipe: list = []
seed: int = 0
calibration: dict = {"text": "text.txt", "samples": 128, "length": 256}
evaluation: dict = {"text": "text.txt"}"""
SETUP = """from pathlib import Path

import qlib

run = qlib.start(globals())"""
COUNT = """with open("executions.txt", "a") as log:
    log.write(f"{name}\\n")"""
BODIES = {
    "plain": "print('nothing to do')",
    "killed": "import os\nif not Path('healed').exists():\n    os.kill(os.getpid(), 9)",
    "raises": "raise ZeroDivisionError('on \\x1b[31mpurpose')",
    "slow": (
        "import os, time\nPath('kernel.pid').write_text(str(os.getpid()))\n"
        "while not Path('healed').exists():\n    time.sleep(0.05)"
    ),
    "full": "(run.folder / 'large').write_bytes(bytes(8_000_000))",
    "unrecorded": "record = None",
}
#: A strategy file as a mapping; tests change what they are about.
PLAIN = {
    "name": "plain",
    "title": {"en": "Plain", "zh": "普通"},
    "family": "baseline",
    "tier": "core",
    "notebook": "plain.ipynb",
    "model": "model",
    "evaluation": {"text": "text.txt"},
}


def measurements(family: str = "baseline") -> dict[str, dict[str, Any]]:
    return {name: {"value": 1.5, "unit": UNITS[name]} for name in REQUIRED[family]}


def write_notebook(path: Path, body: str, parameters: str = PARAMETERS, recorded: bool = True) -> None:
    cells = [
        nbformat.v4.new_markdown_cell("# A small notebook", id="title"),
        nbformat.v4.new_code_cell(parameters, id="parameters", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(SETUP, id="setup"),
        nbformat.v4.new_code_cell(COUNT, id="count"),
        nbformat.v4.new_code_cell(body, id="body"),
    ]
    if recorded:
        cells.append(nbformat.v4.new_code_cell(f"qlib.record(run, {measurements()!r}, {{}})", id="record"))
    elsewhere = {"kernelspec": {"name": "elsewhere", "display_name": "Elsewhere", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=elsewhere), path)


def write_lesson(root: Path, family: str, body: str = "print('look')", prose: str = "What is it? Look.") -> Path:
    """A lesson that notes, like the strategies, that it was run."""
    path = root / "notebooks" / "lessons" / f"{family}.ipynb"
    path.parent.mkdir(exist_ok=True)
    parameters = {"id": "parameters", "metadata": {"tags": ["parameters"]}}
    cells = [
        nbformat.v4.new_markdown_cell(f"# All about {family}\n\n{prose}", id="title"),
        nbformat.v4.new_code_cell('model: str = "model"\nseed: int = 0', **parameters),
        nbformat.v4.new_code_cell(f"name = 'lesson-{family}'\n{COUNT}", id="count"),
        nbformat.v4.new_code_cell(body, id="body"),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path
