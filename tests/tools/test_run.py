"""A worker that breaks: what is said of it. The interpreter is a script, so that nothing of a tool is needed."""

import pytest
import torch

from qlib.errors import UserError
from qlib.quantize.tool import Options
from qlib.tools.run import run_tool


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """A project with one tool, whose worker is the given shell script; returns a function that asks it."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "params" / "tools").mkdir(parents=True)
    lock = tmp_path / "params" / "tools" / "gptqmodel.lock"
    lock.write_text("gptqmodel==1.0\n")
    environment = tmp_path / ".tools" / "gptqmodel"
    (environment / "bin").mkdir(parents=True)
    (environment / ".installed").write_bytes(lock.read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("QLIB_TOOLS", raising=False)

    def ask(script: str, **options):
        python = environment / "bin" / "python"
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
        return run_tool(Options("gptqmodel"), tmp_path, torch.ones(1, 4, dtype=torch.int64), **options)

    return ask


def test_a_crash_is_told_with_its_last_lines(worker):
    with pytest.raises(UserError, match="gptqmodel: its worker ended with code 3\n    out of luck"):
        worker("echo out of luck; exit 3")


def test_an_error_of_the_tool_is_told_in_its_words(worker):
    error = '{"error": {"kind": "ValueError", "text": "only even bits", "refused": false}}'
    with pytest.raises(UserError, match="^gptqmodel: ValueError: only even bits$"):
        worker(f"echo '{error}' > result.json; exit 1")


def test_a_limit_ends_it(worker):
    with pytest.raises(UserError, match="gptqmodel: took longer than its limit of 0.5 seconds"):
        worker("exec sleep 20", limit=0.5)
