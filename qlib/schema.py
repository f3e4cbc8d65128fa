"""Check values read from YAML against a dataclass, field by field, and describe the same dataclass as JSON Schema.

Every problem is one line: field, value, what is allowed, and the nearest name for what is misspelt.
"""

import math
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import lru_cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from qlib.errors import UserError, nearest

__all__ = ["check", "describe", "docs_of", "plain_problem", "show", "names_of", "allowed"]

WORDS = {
    int: "an integer",
    float: "a number",
    str: "a text",
    bool: "true or false",
    NoneType: "null",
    dict: "a mapping",
}


def check(kind: type, values: Any, path: str = "", hints: dict[str, Any] | None = None) -> tuple[Any, list[str]]:
    """Build the dataclass `kind` from a mapping.

    Args:
        path: what to put before the name of a field in a message, e.g. ``evaluation.``.
        hints: types of the fields, where they cannot be looked up from `kind`.

    Returns:
        The instance (None if there are problems) and the problems, one line each.
    """
    if not isinstance(values, dict):
        return None, [f"{path.rstrip('.')}: {show(values)} is not a mapping; allowed: {', '.join(names_of(kind))}"]
    hints = hints or get_type_hints(kind)
    known = {field.name: field for field in fields(kind)}
    problems = [
        f"{path}{key}: unknown field{nearest(key, known)}; allowed: {', '.join(known)}"
        for key in values
        if key not in known
    ]
    built = {}
    for name, field in known.items():
        if name in values:
            built[name], found = _check_field(hints[name], values[name], f"{path}{name}", field)
            problems += found
        elif _required(field):
            problems.append(f"{path}{name}: is missing; allowed: {allowed(hints[name], field)}")
    if problems:
        return None, problems
    try:
        return kind(**built), []
    except UserError as error:
        return None, [f"{path.rstrip('.')}: {error}" if path else str(error)]


def _check_field(hint: Any, value: Any, path: str, field: Field) -> tuple[Any, list[str]]:
    if is_dataclass(hint):
        return check(hint, value, f"{path}.")
    problem = plain_problem(value)
    if problem:
        return None, [f"{path}: {problem}"]
    checked, fits = _convert(hint, value)
    least = field.metadata.get("minimum")
    if not fits or (least is not None and checked is not None and checked < least):
        options = [str(choice) for choice in _choices(hint)]
        close = nearest(str(value), options) if isinstance(value, str) else ""
        close += f"; allowed: {allowed(hint, field)}{_yaml_hint(value, hint)}"
        return None, [f"{path}: {show(value)} is not allowed{close}"]
    return checked, []


def _convert(hint: Any, value: Any) -> tuple[Any, bool]:
    """The value as pydantic's strict mode takes it, which knows no conversion but int to float."""
    checked = list(value) if isinstance(value, tuple) else value
    if isinstance(checked, bool) and bool not in _members(hint) and hint is not Any:
        return None, any(choice is checked for choice in _choices(hint))  # True equals 1, but nobody means that
    if isinstance(checked, float) and not {float, Any} & set(_members(hint)):
        return None, any(type(choice) is float and choice == checked for choice in _choices(hint))
    from pydantic import ValidationError

    try:
        return _adapter(hint).validate_python(checked, strict=True), True
    except ValidationError:
        return None, False


@lru_cache(maxsize=None)
def _adapter(hint: Any):
    from pydantic import TypeAdapter

    return TypeAdapter(hint)


def plain_problem(value: Any) -> str:
    """Say why a value cannot cross into a notebook (only plain, finite JSON values can), or an empty string."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value} is not a finite number"
    if value is None or isinstance(value, (str, int, float)):
        return ""
    if isinstance(value, (list, tuple)):
        return next(filter(None, map(plain_problem, value)), "")
    if isinstance(value, dict):
        odd = [key for key in value if not isinstance(key, str)]
        if odd:
            return f"the key {show(odd[0])} is not a text; quote it"
        return next(filter(None, map(plain_problem, value.values())), "")
    return f"{show(value)} is a {type(value).__name__}; allowed: text, number, true, false, null, list, mapping"


def show(value: Any) -> str:
    """A value as YAML writes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"'{value}'" if isinstance(value, str) else str(value)


def names_of(kind: type) -> list[str]:
    return [field.name for field in fields(kind)]


def allowed(hint: Any, field: Field | None = None) -> str:
    """What a field may hold, in words: ``2, 3, 4`` or ``an integer of at least 1 or null``."""
    if is_dataclass(hint):
        return f"a mapping of {', '.join(names_of(hint))}"
    least = field.metadata.get("minimum") if field else None
    words = []
    for member in _members(hint):
        if get_origin(member) is Literal:
            words.append(", ".join(map(show, get_args(member))).replace("'", ""))
        elif get_origin(member) is list:
            inner = get_args(member)[0] if get_args(member) else Any
            words.append(f"a list of {allowed(inner).replace('a text', 'texts').replace('a mapping', 'mappings')}")
        else:
            words.append(WORDS.get(get_origin(member) or member, "any value"))
    at_least = f" of at least {least}" if least is not None else ""
    words = [word + at_least if "integer" in word or "number" in word else word for word in words]
    return ", ".join(words) if get_origin(_members(hint)[0]) is Literal else " or ".join(words)


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _choices(hint: Any) -> list[Any]:
    return [choice for member in _members(hint) if get_origin(member) is Literal for choice in get_args(member)]


def _yaml_hint(value: Any, hint: Any) -> str:
    """Explain what YAML 1.1 made of the value, if that is the likely cause."""
    members = _members(hint)
    if isinstance(value, bool) and (str in members or any(isinstance(choice, str) for choice in _choices(hint))):
        return " (YAML reads yes, no, on and off as true or false; quote the word)"
    if isinstance(value, str) and {int, float} & set(members):
        try:
            number = float(value)
        except ValueError:
            return ""
        wanted = int(number) if float not in members and number.is_integer() else number
        return f" (YAML reads this as text; write {wanted!r})" if math.isfinite(number) else ""
    return ""


def _required(field: Field) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def docs_of(kind: type) -> dict[str, str]:
    """Help of each field, from the ``Args:`` of the docstrings of the class and of those it inherits from."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        found |= _own_docs(base, kind)
    return found


def _own_docs(base: type, kind: type) -> dict[str, str]:
    found: dict[str, str] = {}
    name = None
    for line in (base.__doc__ or "").partition("Args:")[2].splitlines():
        head, colon, text = line.strip().partition(": ")
        if colon and head.isidentifier() and head in {field.name for field in fields(kind)}:
            name, found[head] = head, text
        elif name and line.strip():
            found[name] += " " + line.strip()
        elif name:
            break
    return found


def describe(kind: type, hints: dict[str, Any] | None = None) -> dict[str, Any]:
    """JSON Schema of a dataclass: types, defaults, help, nothing beside the known fields."""
    hints, docs, properties = hints or get_type_hints(kind), docs_of(kind), {}
    for field in fields(kind):
        hint = hints[field.name]
        entry = describe(hint) if is_dataclass(hint) else dict(_adapter(hint).json_schema())
        entry |= {"title": field.name.replace("_", " ")}
        if field.name in docs:
            entry["description"] = docs[field.name]
        if "minimum" in field.metadata:
            entry = _with_minimum(entry, field.metadata["minimum"])
        if not _required(field) and not is_dataclass(hint):
            default = field.default if field.default is not MISSING else field.default_factory()
            entry["default"] = list(default) if isinstance(default, tuple) else default
        properties[field.name] = entry
    summary = (kind.__doc__ or "").strip().splitlines()
    shape = {"type": "object", "properties": properties, "additionalProperties": False}
    needed = [field.name for field in fields(kind) if _required(field)]
    return ({"description": summary[0]} if summary else {}) | shape | ({"required": needed} if needed else {})


def _with_minimum(entry: dict[str, Any], least: int) -> dict[str, Any]:
    if "anyOf" in entry:
        return entry | {"anyOf": [_with_minimum(option, least) for option in entry["anyOf"]]}
    return entry | {"minimum": least} if entry.get("type") in ("integer", "number") else entry
