"""Copy what was measured and rendered to `reports/published/`, which is committed: in one step, or not at all."""

import os
import shutil
from pathlib import Path
from typing import Iterable

from qlib.errors import UserError
from qlib.params import Strategy
from qlib.paths import slug
from qlib.runs.state import read_json

__all__ = ["publish"]

FILES = ("record.json", "items.npz")
PAGES = ("index.html", "notebooks")


def publish(strategies: Iterable[Strategy], runs: Path, page: Path, published: Path) -> list[str]:
    """Replace `published` by the finished records of `strategies` and the rendered report.

    A strategy without a record here keeps the published one; records of strategies that are gone are dropped. Records
    of another device than the CPU get a folder of their own, ``NAME@DEVICE``.

    Args:
        page: the rendered index.html; `notebooks/` beside it goes along.

    Returns:
        Names of the folders under `records/` that are new.

    Raises:
        UserError: there is no rendered report, or no record at all.
    """
    if not page.is_file():
        raise UserError(f"{page}: there is no report to publish; make one with `qlib report`")
    new, old = (published.with_name(f".{published.name}.{name}") for name in ("new", "old"))
    if old.exists() and not published.exists():  # an earlier call was killed between its two renames
        os.replace(old, published)
    shutil.rmtree(new, ignore_errors=True)
    (new / "records").mkdir(parents=True)
    fresh = []
    for strategy in strategies:
        for kept in sorted((published / "records").glob(f"{strategy.name}*")):
            if kept.name.partition("@")[0] == strategy.name:
                shutil.copytree(kept, new / "records" / kept.name)
        for folder in sorted((runs / slug(strategy.model)).glob(f"*/{strategy.name}")):
            if _is_done(folder):
                device = folder.parent.name
                name = strategy.name if device == "cpu" else f"{strategy.name}@{device}"
                _copy(folder, new / "records" / name, FILES)
                fresh.append(name)
    if not any((new / "records").iterdir()):
        shutil.rmtree(new)
        raise UserError(f"{runs}: holds no finished record; run strategies with `qlib run`")
    _copy(page.parent, new, PAGES)
    shutil.rmtree(old, ignore_errors=True)
    if published.exists():
        os.replace(published, old)
    os.replace(new, published)
    shutil.rmtree(old, ignore_errors=True)
    return fresh


def _is_done(folder: Path) -> bool:
    record, status = read_json(folder / "record.json"), read_json(folder / "status.json")
    return bool(record and record.get("key") and (status or {}).get("state") == "done")


def _copy(source: Path, target: Path, names: Iterable[str]) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name)
        elif (source / name).is_file():
            shutil.copy2(source / name, target / name)
        else:
            (target / name).unlink(missing_ok=True)

