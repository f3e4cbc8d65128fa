"""A small project in a temporary folder: real notebooks, real kernels, numbers that cost nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_project import BODIES, PACKAGE, PLAIN, write_notebook, write_weights


@pytest.fixture
def project(tmp_path: Path) -> SimpleNamespace:
    """A project in a folder whose name has braces, with a notebook for each way to end."""
    root = tmp_path / "a{b}c"
    for folder in ("params", "notebooks", "model"):
        (root / folder).mkdir(parents=True)
    (root / "model" / "config.json").write_text("{}")
    write_weights(root / "model", 1.0)
    (root / "model" / "tokenizer.json").write_text("{}")
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
        command = [sys.executable, "-m", "qlib", *arguments]
        return subprocess.Popen(command, cwd=root, env=environment, **pipes, **options)

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
        runs=root / "reports" / "runs", environment=environment,
    )  # fmt: skip
