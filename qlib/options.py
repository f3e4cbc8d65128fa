"""Read the typed options of a pass from its source, so that checking a recipe does not import torch."""

import __future__
import ast
import sys
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_type_hints

__all__ = ["options_of"]

FUTURE = __future__.annotations.compiler_flag
LIGHT = ("qlib.errors", "qlib.quantize.formats")


@lru_cache(maxsize=None)
def options_of(module: str) -> tuple[type, dict[str, Any]]:
    """The class `Options` of a pass, given as the dotted name of its module, and the types of its fields.

    Only the class and what it needs of the standard library and of the module's own constants is executed. Where that
    is not enough (a base class from elsewhere), the module is imported.
    """
    try:
        return _extract(module)
    except Exception:  # whatever is missing in the extract is there in the module
        options = import_module(module).Options
        return options, get_type_hints(options)


def _extract(module: str) -> tuple[type, dict[str, Any]]:
    source = Path(find_spec(module).origin)
    tree = ast.parse(source.read_text(encoding="utf-8"))
    body = {}
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)) and _is_light(node):
            body[node.lineno] = node
        elif isinstance(node, ast.ClassDef) and node.name == "Options":
            body |= {n.lineno: n for n in _constants(tree, node)} | {node.lineno: node}
    extract = ast.Module([body[line] for line in sorted(body)], type_ignores=[])
    namespace: dict[str, Any] = {"__name__": __name__}
    exec(compile(extract, str(source), "exec", flags=FUTURE, dont_inherit=True), namespace)
    options = namespace["Options"]
    hints = get_type_hints(options, globalns=namespace)
    options()  # a check of its own that needs more than the extract shows here
    return options, hints


def _is_light(node: ast.Import | ast.ImportFrom) -> bool:
    """True for imports of the standard library and of the modules of qlib that need no more than it."""
    names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
    return all(name.partition(".")[0] in sys.stdlib_module_names or name in LIGHT for name in names)


def _constants(tree: ast.Module, options: ast.ClassDef) -> list[ast.stmt]:
    """Assignments of the module that the class refers to, directly or through one another."""
    assigned = {
        target.id: node
        for node in tree.body
        if isinstance(node, (ast.Assign, ast.AnnAssign))
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    found: dict[int, ast.stmt] = {}
    waiting: list[ast.AST] = [options]
    while waiting:
        for node in ast.walk(waiting.pop()):
            if isinstance(node, ast.Name) and node.id in assigned and assigned[node.id].lineno not in found:
                found[assigned[node.id].lineno] = assigned[node.id]
                waiting.append(assigned[node.id])
    return list(found.values())
