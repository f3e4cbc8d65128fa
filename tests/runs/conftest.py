"""A small project in a temporary folder: real notebooks, real kernels, numbers that cost nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest

import qlib
from qlib.record import REQUIRED, UNITS

PACKAGE = Path(qlib.__file__).parent
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


@pytest.fixture
def project(tmp_path: Path) -> SimpleNamespace:
    """A project in a folder whose name has braces, with a notebook for each way to end."""
    root = tmp_path / "a{b}c"
    for folder in ("params", "notebooks", "model"):
        (root / folder).mkdir(parents=True)
    (root / "model" / "config.json").write_text("{}")
    (root / "model" / "model.safetensors").write_bytes(b"weights")
    (root / "text.txt").write_text("some text\n")
    for name, body in BODIES.items():
        write_notebook(root / "notebooks" / f"{name}.ipynb", body, recorded=name != "unrecorded")

    def add(name: str, **changes: Any) -> Path:
        values = PLAIN | {"name": name, "notebook": f"{name}.ipynb" if name in BODIES else "plain.ipynb"} | changes
        file = root / "params" / f"{name}.yaml"
        file.write_text(f"# {name}: two seconds\n" + json.dumps(values, indent=1), encoding="utf-8")
        return file

    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}

    def start(*arguments: str, **options: Any) -> subprocess.Popen:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([sys.executable, "-m", "qlib", *arguments], cwd=root, env=environment, **pipes, **options)

    def call(*arguments: str) -> SimpleNamespace:
        process = start(*arguments)
        out, err = process.communicate(timeout=120)
        return SimpleNamespace(code=process.returncode, out=out, err=err)

    def executions() -> list[str]:
        """Names of the strategies that were run since the last call, in order."""
        log = root / "executions.txt"
        names = log.read_text().split() if log.exists() else []
        log.unlink(missing_ok=True)
        return names

    def folder(name: str) -> Path:
        return next(root.glob(f"reports/runs/*/cpu/{name}"))

    def status(name: str) -> dict[str, Any]:
        return json.loads((folder(name) / "status.json").read_text())

    return SimpleNamespace(
        root=root, add=add, start=start, call=call, executions=executions, folder=folder, status=status,
        runs=root / "reports" / "runs",
    )  # fmt: skip
