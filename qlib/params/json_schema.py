"""The JSON Schema of strategy files, by which editors complete and check them."""

from typing import Any

from qlib.options import options_of
from qlib.params.checks import NAME
from qlib.params.strategy import WITHOUT_RECIPE, Strategy
from qlib.recipe import pass_names
from qlib.schema import describe

__all__ = ["schema"]


def schema() -> dict[str, Any]:
    """JSON Schema of a strategy file, for editors: from the dataclasses and the options of every pass."""
    passes = {}
    for name, module in sorted(pass_names().items()):
        kind, hints = options_of(module)
        entry = describe(kind, hints)
        named = {"pass": {"const": name, "title": "pass", "description": entry.get("description", "")}}
        required = ["pass", *entry.get("required", [])]
        passes[name] = entry | {"title": name, "properties": named | entry["properties"], "required": required}
    whole = describe(Strategy)
    choices = [{"$ref": f"#/$defs/{name}"} for name in passes]
    whole["properties"]["recipe"]["items"] = {"oneOf": choices} if choices else False
    whole["properties"]["name"]["pattern"] = f"^{NAME.pattern}$"
    bare = {"properties": {"family": {"enum": list(WITHOUT_RECIPE)}}}
    needs_recipe = {"required": ["recipe"], "properties": {"recipe": {"minItems": 1}}}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Strategy",
        **whole,
        "if": bare,
        "then": {"properties": {"recipe": {"maxItems": 0}}},
        "else": needs_recipe,
        "$defs": passes,
    }
