"""YAML as this project reads it: every problem is one clear line, and no key may be given twice."""

from pathlib import Path
from typing import Any, Iterable

from qlib.errors import UserError, nearest

__all__ = ["read_yaml", "parse_yaml", "parse_assignments", "shown"]


def read_yaml(path: Path) -> Any:
    """Parse a YAML file.

    Raises:
        UserError: no such file, not UTF-8, not YAML, or a mapping that gives a key twice.
    """
    try:
        return parse_yaml(path.read_text(encoding="utf-8"), shown(path))
    except FileNotFoundError:
        close = nearest(path.name, [file.name for file in path.parent.glob("*.yaml")])
        raise UserError(f"{shown(path)}: no such file{close}") from None
    except UnicodeDecodeError:
        raise UserError(f"{shown(path)}: is not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"{shown(path)}: cannot be read: {error.strerror}") from None


def parse_yaml(text: str, where: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """PyYAML's, but a key that is given twice is an error and not overwritten."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            twice = [str(key) for key in keys if keys.count(key) > 1]
            if twice:
                raise UserError(f"{where}: {twice[0]}: is given twice (line {node.start_mark.line + 1} ff.)")
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{where}: is not YAML{line}: {reason}") from None


def parse_assignments(pairs: Iterable[str]) -> dict[str, Any]:
    """Turn ``["seed=3", "recipe=[{pass: rtn, bits: 3}]"]`` into a mapping; values are YAML.

    Raises:
        UserError: no ``=``, or a value that is not YAML.
    """
    found = {}
    for pair in pairs:
        key, equal, value = pair.partition("=")
        if not equal or not key.strip():
            raise UserError(f"-p {pair}: is not key=value, e.g. -p seed=1 or -p recipe.0.bits=3")
        found[key.strip()] = parse_yaml(value, f"-p {key.strip()}")
    return found


def shown(path: Path) -> str:
    """A path relative to the current folder where that is shorter."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
