"""A new tool is one adapter, one lock and one strategy: a dummy is added so, runs, and stands in the report's league."""

import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from test_environments import write_wheel

ROOT = Path(__file__).parents[2]
ADAPTER = '''"""A tool that rounds every weight to the nearest of 256 values of its row."""

import time

import torch

from qlib.tools.about import About
from qlib.tools.adapter import Quantized, bits_per_weight, load_model
from qlib.tools.runtime import ModuleRuntime

ABOUT = About(
    package="faketool",
    idea="Rounds to the nearest.",
    method="RTN",
    runtime="torch",
    documentation="https://example.org",
    loads=("nothing",),
    reads_text=False,
)


def quantize(folder, ids, options):
    model, begun = load_model(folder), time.perf_counter()
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    weights = {}
    for name, linear in linears.items():
        scale = linear.weight.float().abs().amax(1, keepdim=True) / 127
        weights[name] = (linear.weight.float() / scale).round() * scale
    seconds = time.perf_counter() - begun
    return Quantized(weights, seconds, bits_per_weight(weights, options, zeros=False), {"rounding": "nearest"})


def open_runtime(folder, options):
    return ModuleRuntime(load_model(folder).float())
'''
STRATEGY = """# A dummy in 8 bits: no loss; seconds on any machine.
name: tool-faketool-int8
title: {en: "a dummy, 8 bits", zh: "示例工具，8 比特"}
family: tool
tier: full
notebook: tool.ipynb
model: reference-2
recipe:
  - {pass: tool, name: faketool, bits: 8, group_size: null, symmetric: true}
calibration: {text: reference, samples: 4, length: 128}
evaluation: {text: reference, documents: 60, length: 128, items: 60, bootstrap: 50}
"""


@pytest.fixture
def project(tmp_path):
    """A copy of the project without runs, strategies and environments."""
    for part in ("qlib", "notebooks", "pyproject.toml", "requirements.lock"):
        source = ROOT / part
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, tmp_path / part)
    (tmp_path / "params" / "tools").mkdir(parents=True)
    (tmp_path / "wheels").mkdir()
    write_wheel(tmp_path / "wheels", "1.0")
    return tmp_path


def call(project: Path, *words: str, module: bool = True) -> str:
    """A command of the copy; else arguments for its Python."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(project), "PYTHONPATH": str(project), "QLIB_NATIVE": "0"}
    command = [sys.executable, *(["-m", "qlib"] if module else []), *words]
    found = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


@pytest.mark.slow
def test_three_files_make_a_tool(project):
    (project / "qlib/tools/adapters/faketool.py").write_text(ADAPTER)
    (project / "params/tools/faketool.lock").write_text("# A dummy. MIT.\n# released: 2026-01-31\nfaketool==1.0\n")
    (project / "params/tool-faketool-int8.yaml").write_text(STRATEGY)
    call(project, "tools", "install", "faketool", f"--pip-args=--no-index --find-links {project / 'wheels'}")
    # A real lock holds torch and a kernel; here the dummy borrows ours.
    packages = next((project / ".tools/faketool/lib").glob("python*/site-packages"))
    (packages / "borrowed.pth").write_text(f"{sysconfig.get_path('purelib')}\n")

    call(project, "run", "tool-faketool-int8")
    record = json.loads(next(project.glob("reports/runs/**/tool-faketool-int8/record.json")).read_text())
    tool, measured = record["details"]["tool"], record["measurements"]
    assert tool["name"] == "faketool" and tool["versions"]["faketool"] == "1.0" and tool["method"] == "RTN"
    assert tool["facts"]["released"] == "2026-01-31" and tool["ids"]["reached"] is None
    assert tool["uncompressed"]["its"] == pytest.approx(tool["uncompressed"]["ours"], rel=1e-5)
    assert len(tool["runs"]) == 3 and len({run["digest"] for run in tool["runs"]}) == 1
    assert 8 < measured["size.bits_per_weight"]["value"] < 8.2
    assert measured["quality.perplexity_ratio"]["value"] == pytest.approx(1, abs=0.01)

    assert "faketool  1.0      installed  1 of 1" in call(project, "tools", "list")
    code = (
        "from pathlib import Path; from qlib.bench.guests import tool; from qlib.quantize.tool import Options\n"
        "options, folder = Options('faketool', 8, None, True), Path('qlib/models/reference-2').resolve()\n"
        "with tool(options, folder, folder, 16, 8, 1, 100) as guest:\n"
        "    [guest.ask(phase) for phase in ('decode', 'prefill', 'decode')]\n"
        "    print(len(guest.milliseconds('decode', 'layer', 2)), guest.about['versions']['faketool'], guest.rounds['prefill'])\n"
    )
    said = call(project, "-c", code, module=False)
    assert said.startswith("2 1.0 [{'layer': ") and "'rest': " in said

    call(project, "report")
    page = (project / "reports" / "index.html").read_text()
    assert 'id="table-league"' in page and "tool-faketool-int8" in page and "released 2026-01-31" in page
