"""Which parameters a notebook takes, and the values it is given."""

import ast
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from qlib.errors import UserError
from qlib.params import Strategy, to_dict

__all__ = ["injected", "parameter_names", "parameters_cell"]


def parameters_cell(notebook: Path) -> str:
    """Source of the cell tagged `parameters`, empty if there is none."""
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code" and "parameters" in cell.get("metadata", {}).get("tags", []):
            return "".join(cell["source"])
    return ""


def parameter_names(notebook: Path) -> list[str]:
    """Names that the parameters cell of a notebook assigns."""
    names = []
    for node in ast.parse(parameters_cell(notebook)).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names += [target.id for target in targets if isinstance(target, ast.Name)]
    return names


def injected(strategy: Strategy, root: Path) -> dict[str, Any]:
    """The effective value of every parameter that the strategy's notebook takes.

    Raises:
        UserError: the strategy sets a parameter that the notebook does not take.
    """
    taken = parameter_names(root / "notebooks" / strategy.notebook)
    values = to_dict(strategy)
    plain = to_dict(Strategy(strategy.name, strategy.title, strategy.family, strategy.tier, strategy.notebook))
    for field in fields(Strategy):
        if field.name not in taken and values[field.name] != plain[field.name]:
            raise UserError(
                f"{strategy.name}: {field.name}: notebooks/{strategy.notebook} takes no such parameter; "
                f"allowed: {', '.join(taken) or 'none: it has no cell tagged parameters'}"
            )
    return {name: value for name, value in values.items() if name in taken}
