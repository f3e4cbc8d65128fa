"""What a strategy notebook does first: check the parameters it was given and say what it runs on."""

import ast
import os
from dataclasses import dataclass, fields
from html import escape
from pathlib import Path
from typing import Any

from qlib.errors import UserError, nearest
from qlib.params import Strategy, from_dict, to_dict
from qlib.runs.provenance import provenance, torch_device

__all__ = ["Run", "start"]

#: First line of the cell that papermill adds for the parameters it was given.
INJECTED = "# Parameters"


@dataclass(frozen=True)
class Run:
    """One execution of a strategy.

    Attributes:
        strategy: its checked parameters.
        folder: where its result goes; exists.
        seed: of everything random.
        device: "cpu" or "cuda": where to compute.
    """

    strategy: Strategy
    folder: Path
    seed: int
    device: str = "cpu"

    @property
    def params(self) -> dict[str, Any]:
        """The effective parameters as plain values."""
        return to_dict(self.strategy)


def start(names: dict[str, Any]) -> Run:
    """Check the notebook's parameters, show them with where they run, and prepare the folder of the result.

    Args:
        names: the notebook's `globals()`, which hold a variable for each parameter.

    Raises:
        UserError: a parameter of the wrong type, or one that papermill was given and the schema does not know.
    """
    known = [field.name for field in fields(Strategy)]
    unknown = [name for name in given_names(names) if name not in known]
    if unknown:
        close = nearest(unknown[0], known)
        raise UserError(f"parameters: '{unknown[0]}' is unknown{close}; allowed: {', '.join(known)}")
    strategy = from_dict({name: names[name] for name in known if name in names}, "parameters")
    folder = Path(os.environ.get("QLIB_RUN_DIR") or f"./{strategy.name}")
    folder.mkdir(parents=True, exist_ok=True)
    _show(strategy)
    return Run(strategy, folder, strategy.seed, torch_device())


def given_names(names: dict[str, Any]) -> list[str]:
    """Names that papermill injected; where no history tells, all public names that hold plain values."""
    if "In" not in names:
        values = (str, int, float, list, dict, type(None))
        return [name for name, value in names.items() if not name.startswith("_") and isinstance(value, values)]
    found = []
    for source in names["In"]:
        if source.startswith(INJECTED):
            targets = [node.targets[0] for node in ast.parse(source).body if isinstance(node, ast.Assign)]
            found += [target.id for target in targets if isinstance(target, ast.Name)]
    return found


def _show(strategy: Strategy) -> None:
    try:
        from IPython.display import HTML, display
    except ImportError:
        return
    where = provenance(strategy.seed)
    packages = ", ".join(f"{name} {version}" for name, version in where.pop("packages").items())
    display(HTML(_table("Parameters", _flat(to_dict(strategy)))))
    known = {name: value for name, value in where.items() if value is not None} | {"packages": packages}
    display(HTML(_table("Provenance", known)))


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` -> ``{"a.b": 1}``; lists of mappings are numbered."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            value = dict(enumerate(value))
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _table(caption: str, rows: dict[str, Any]) -> str:
    words = {None: "all", True: "yes", False: "no"}
    body = "".join(
        f'<tr><th scope="row">{escape(str(name))}</th><td>'
        f"{escape(str(words[value] if value is None or isinstance(value, bool) else value))}</td></tr>"
        for name, value in rows.items()
        if value != []
    )
    head = '<thead><tr><th scope="col">name</th><th scope="col">value</th></tr></thead>'
    return f'<table class="{caption.lower()}"><caption>{caption}</caption>{head}<tbody>{body}</tbody></table>'
