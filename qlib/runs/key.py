"""The cache key: a strategy is up to date while everything its numbers depend on is what it was."""

import ast
import hashlib
import json
from pathlib import Path
from typing import Any

from qlib.errors import UserError
from qlib.params import SHAPES_ONLY, Strategy, to_dict, tool_of
from qlib.recipe import pass_names
from qlib.runs.imports import reach
from qlib.runs.lessons import is_lesson
from qlib.runs.provenance import device_class, version_of
from qlib.runs.subject_hash import data_hash, model_hash
from qlib.scale.methods import METHODS
from qlib.tools.about import adapter_name
from qlib.tools.environments import environment_of

__all__ = ["key_parts", "key_of", "differences", "code_cells", "SOURCE"]

SOURCE = Path(__file__).parent.parent
#: Parameters that only say how a strategy is called and when it runs.
NAMES_ONLY = ("title", "tier")
#: Modules that compute nothing on a CPU.
GPU_ONLY = ("qlib.layers.triton_kernels",)


def key_parts(strategy: Strategy, root: Path, source: Path = SOURCE) -> dict[str, Any]:
    """What the numbers of `strategy` depend on, part by part.

    Args:
        root: the project: notebooks, and what relative paths in parameters refer to.
        source: folder of the package whose sources are read.

    Raises:
        UserError: the model or the text does not exist.
    """
    notebook = root / "notebooks" / strategy.notebook
    cells = code_cells(notebook)
    code, passes = "\n".join(cells), pass_names()
    try:
        named = _named(code) & passes.keys() if is_lesson(strategy) else _passes(strategy)
        tool = tool_of(strategy)
        modules = [passes[name] for name in sorted(named)] + ([adapter_name(tool)] if tool else [])
        reached = reach(modules, code, source, GPU_ONLY if device_class() == "cpu" else ())
    except SyntaxError as error:
        raise UserError(f"{error.filename or notebook.name}: is not plain Python: {error.msg}: {error.text}") from None
    return {
        "notebook": _digest(cells),
        "parameters": {name: value for name, value in to_dict(strategy).items() if name not in NAMES_ONLY},
        "sources": dict(sorted(reached.sources.items())),
        "packages": _packages(tool, reached.packages, root),
        "model": strategy.model if strategy.family in SHAPES_ONLY else model_hash(strategy.model, root),
        "data": {} if strategy.family in SHAPES_ONLY else _texts(strategy, root),
        "device": device_class(),
    }


def _passes(strategy: Strategy) -> set[str]:
    """The passes that a strategy applies: those of its recipe, or of every method that is tried at a true shape."""
    recipes = [method.recipe for method in METHODS.values()] if strategy.family == "scale" else [strategy.recipe]
    return {step["pass"] for recipe in recipes for step in recipe}


def _packages(tool: str | None, packages: set[str], root: Path) -> dict[str, str | None]:
    """Versions of what is imported; in a tool's environment those that its lock fixes, all of them."""
    if tool:
        return {f"params/tools/{tool}.lock": environment_of(tool, root).lock_hash()}
    return {name: version_of(name) for name in sorted(packages)}


def _named(code: str) -> set[str]:
    """All texts in some code: a lesson has its recipes there, so that any of them may be the name of a pass."""
    values = (node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant))
    return {value for value in values if isinstance(value, str)}


def key_of(parts: dict[str, Any]) -> str:
    """One SHA-256 over all parts."""
    return _digest(parts)


def code_cells(notebook: Path) -> list[str]:
    """Source of the code cells, in order; prose, outputs and metadata do not count."""
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{notebook}: is not a notebook that can be read") from None
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def _texts(strategy: Strategy, root: Path) -> dict[str, str]:
    texts = {strategy.evaluation.text} | {step["text"] for step in strategy.recipe if "text" in step}
    if strategy.recipe or strategy.family == "training":
        texts.add(strategy.calibration.text)
    return {text: data_hash(text, root) for text in sorted(texts)}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Say in words which parts changed: ``sources qlib.walk changed``, ``parameters recipe[0].bits: 4 -> 3``."""
    found = []
    hashes = ("notebook", "sources", "data", "records")
    for part in new:
        before, after = _flat(old.get(part), part), _flat(new[part], part)
        for name in sorted(before.keys() | after.keys()):
            if before.get(name) == after.get(name):
                continue
            short = [_short(side.get(name)) for side in (before, after)]
            hashed = part in hashes or (part == "model" and len(str(after.get(name))) == 64)
            if name not in before or name not in after:
                found.append(f"{name} {'new' if name not in before else 'gone'}")
            else:
                found.append(f"{name} changed" if hashed else f"{name}: {short[0]} -> {short[1]}")
    return found


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _flat(value: Any, name: str) -> dict[str, Any]:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return {k: v for i, item in enumerate(value) for k, v in _flat(item, f"{name}[{i}]").items()}
    if not isinstance(value, dict):
        return {name: value}
    space = " " if name in ("parameters", "sources", "packages", "data", "records") else "."
    return {k: v for key, item in value.items() for k, v in _flat(item, f"{name}{space}{key}").items()}
