"""What the subcommands of `qlib` take in common: paths, names of strategies, models."""

import argparse
from pathlib import Path

from qlib.errors import UserError, nearest

__all__ = ["path", "file_or_name", "folder_or_id", "strategy_files", "add_runs"]


def path(text: str) -> Path:
    """An absolute path."""
    return Path(text).expanduser().resolve()


def file_or_name(text: str) -> str:
    """The absolute path of a file; otherwise it is the name of a strategy, and stays."""
    return str(path(text)) if path(text).is_file() else text


def folder_or_id(text: str) -> str:
    """The absolute path of a folder; otherwise it is a hub id or the name of the shipped model, and stays."""
    return str(path(text)) if path(text).is_dir() else text


def add_runs(parser: argparse.ArgumentParser) -> None:
    """Add the option that names another folder of runs."""
    parser.add_argument("--runs", metavar="DIR", type=path, help="folder of the runs (default: reports/runs)")


def strategy_files(given: list[str], root: Path) -> list[Path]:
    """Strategy files: those given by path or name, else all.

    Raises:
        UserError: there is no such file, or none at all.
    """
    if not given:
        files = sorted((root / "params").glob("*.yaml"))
        if not files:
            raise UserError(f"{root / 'params'}: holds no strategy files (*.yaml)")
        return files
    known = {file.stem: file for file in (root / "params").glob("*.yaml")}
    for name in given:
        if name not in known and not Path(name).is_absolute():
            raise UserError(f"{name}: no such strategy file{nearest(Path(name).stem, known)}; see `qlib list`")
    return [known.get(name) or Path(name) for name in given]
