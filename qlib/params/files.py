"""Read strategies from their YAML files, and change values of them from the command line."""

import re
from pathlib import Path
from typing import Any, Iterable

from qlib.errors import UserError, nearest
from qlib.params.checks import from_dict
from qlib.params.strategy import Strategy, to_dict
from qlib.paths import find_root
from qlib.schema import show
from qlib.yamltext import read_yaml, shown

__all__ = ["load_strategy", "load_strategies", "check_notebook", "expectation", "override"]


def load_strategy(path: Path | str, root: Path | None = None) -> Strategy:
    """Read and check one strategy file.

    Raises:
        UserError: one line per problem: file, field, value, what is allowed.
    """
    path = Path(path)
    strategy = from_dict(read_yaml(path), shown(path))
    check_notebook(strategy, root or _root_of(path), shown(path))
    return strategy


def check_notebook(strategy: Strategy, root: Path, where: str) -> None:
    """Make sure that the notebook of a strategy is there.

    Raises:
        UserError: it is not in notebooks/.
    """
    notebooks = root / "notebooks"
    if not (notebooks / strategy.notebook).is_file():
        known = sorted(file.name for file in notebooks.glob("*.ipynb"))
        raise UserError(
            f"{where}: notebook: '{strategy.notebook}' is not in notebooks/"
            f"{nearest(strategy.notebook, known)}; allowed: {', '.join(known) or 'none is there'}"
        )


def load_strategies(paths: Iterable[Path | str], root: Path | None = None) -> list[Strategy]:
    """Read several strategy files, in their order.

    Raises:
        UserError: as `load_strategy`, for all files together; or two files give the same name.
    """
    strategies, problems, seen = [], [], {}
    for path in paths:
        try:
            strategy = load_strategy(path, root)
        except UserError as error:
            problems.append(str(error))
            continue
        if strategy.name in seen:
            problems.append(f"{shown(Path(path))}: name: '{strategy.name}' is already used by {seen[strategy.name]}")
        seen[strategy.name] = shown(Path(path))
        strategies.append(strategy)
    if problems:
        raise UserError("\n".join(problems))
    return strategies


def _root_of(path: Path) -> Path:
    try:
        return find_root(path.resolve().parent)
    except UserError:
        return find_root()


def override(strategy: Strategy, changes: dict[str, Any], where: str = "-p") -> Strategy:
    """A copy with other values; a key may go into the depth: ``evaluation.items``, ``recipe.0.bits``.

    Raises:
        UserError: unknown key, or a value that is not allowed.
    """
    values = to_dict(strategy)
    for key, value in changes.items():
        *folders, last = re.sub(r"\[(\d+)\]", r".\1", key).split(".")
        inner: Any = values
        for depth, step in enumerate([*folders, last]):
            known = [str(i) for i in range(len(inner))] if isinstance(inner, list) else inner
            if not isinstance(inner, (dict, list)):
                raise UserError(f"{where} {key}: {show(inner)} has no fields of its own")
            if step not in known and (isinstance(inner, list) or depth < len(folders) or depth == 0):
                close = nearest(step, known)
                raise UserError(f"{where} {key}: '{step}' is unknown{close}; allowed: {', '.join(known)}")
            if depth < len(folders):
                inner = inner[int(step)] if isinstance(inner, list) else inner[step]
        inner[int(last) if isinstance(inner, list) else last] = value
    return from_dict(values, where)


def expectation(path: Path) -> str:
    """The first comment of a strategy file: what to expect, on what machine, in what time."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    comments = [line.lstrip("# ").strip() for line in lines[:3] if line.startswith("#")]
    return next((line for line in comments if line and not line.startswith("yaml-language-server")), "")
