"""Which source files and packages a piece of code reaches: a static graph of imports, nothing is executed."""

import ast
import hashlib
import sys
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Iterable

__all__ = ["Reach", "reach", "imports_of", "verbs_of", "VERB_TABLE", "PACKAGE", "NEUTRAL"]

PACKAGE = "qlib"
#: Modules that present, plan or check but compute no number of a record: changing them makes no result out of date.
NEUTRAL = (
    "qlib.report", "qlib.cli", "qlib.runs", "qlib.params", "qlib.schema", "qlib.options", "qlib.yamltext",
    "qlib.arguments", "qlib.notebook", "qlib.paths", "qlib.errors", "qlib.progress",
)  # fmt: skip
VERB_TABLE = "VERBS"


@dataclass
class Reach:
    """What some code depends on.

    Attributes:
        sources: module of the package -> SHA-256 of its code without comments, docstrings and layout, which change no
            result, and of the C files in a folder beside it that it names.
        packages: names of other packages.
    """

    sources: dict[str, str] = field(default_factory=dict)
    packages: set[str] = field(default_factory=set)


def reach(roots: Iterable[str], code: str, source: Path, without: Iterable[str] = ()) -> Reach:
    """Follow the imports of modules `roots` and of `code` through the package.

    Args:
        code: Python source (a notebook's cells); the verbs it names (``qlib.load(...)``) are roots as well.
        source: folder of the package, the one that holds `__init__.py`.
        without: modules that are not followed.
    """
    verbs = read_verbs(source)
    found = Reach()
    waiting = list(roots)
    for name in _follow(code, None, verbs):
        waiting.append(name)
    while waiting:
        name = waiting.pop()
        if name.partition(".")[0] != PACKAGE:
            if name.partition(".")[0] not in sys.stdlib_module_names:
                found.packages.add(name.partition(".")[0])
            continue
        module, file = _resolve(name, source)
        if file is None or module == PACKAGE or module in found.sources or module in without or _is_neutral(module):
            continue
        found.sources[module], imported = _read(file, module, tuple(verbs.items()), file.stat().st_mtime_ns)
        waiting += [*imported, module.rpartition(".")[0]]
    return found


def _is_neutral(module: str) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in NEUTRAL)


def _resolve(name: str, source: Path) -> tuple[str, Path | None]:
    """The module a dotted name belongs to (`from a.b import c` may name a module or something inside one)."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        base = source.joinpath(*parts[1:length])
        for file in (base.with_name(base.name + ".py"), base / "__init__.py"):
            if length > 1 and file.is_file():
                return ".".join(parts[:length]), file
    return PACKAGE, None


@lru_cache(maxsize=None)
def _read(file: Path, module: str, verbs: tuple[tuple[str, str], ...], stamp: int) -> tuple[str, list[str]]:
    text = file.read_text(encoding="utf-8")
    inside = module if file.name == "__init__.py" else module.rpartition(".")[0]
    beside = (one for one in sorted(file.parent.glob("*/*.[ch]")) if f'with_name("{one.parent.name}")' in text)
    compiled = "".join(one.read_text(encoding="utf-8") for one in beside)
    return hashlib.sha256((_bare(text) + compiled).encode()).hexdigest(), _follow(text, inside, dict(verbs))


def _bare(text: str) -> str:
    """Python source without comments, docstrings and layout."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and _is_text(body[0]):
            body[0].value.value = ""  # stays as a statement: a body may hold nothing else
    return ast.unparse(tree)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _follow(text: str, inside: str | None, verbs: dict[str, str]) -> list[str]:
    tree = ast.parse(text)
    return imports_of(tree, inside) + [verbs[name] for name in verbs_of(tree) if name in verbs]


def imports_of(tree: ast.AST, inside: str | None = None) -> list[str]:
    """Dotted names that are imported anywhere in the code, but not for type checkers only.

    Args:
        inside: package of the code, to which relative imports refer.
    """
    names: list[str] = []
    for node in _walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level and inside:
                above = inside.split(".")[: len(inside.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            names += [f"{base}.{alias.name}" for alias in node.names]
    return names


def _walk(tree: ast.AST):
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _walk(node)


def verbs_of(tree: ast.AST) -> list[str]:
    """Names taken from the package itself: `qlib.load` and `from qlib import load`."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == PACKAGE:
            names.append(node.attr)
        elif isinstance(node, ast.ImportFrom) and node.module == PACKAGE and not node.level:
            names += [alias.name for alias in node.names]
    return names


def read_verbs(source: Path) -> dict[str, str]:
    """The table of verbs and their modules in the package's `__init__.py`, read without importing it."""
    for node in ast.parse((source / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == VERB_TABLE:
            return ast.literal_eval(node.value)
    return {}
