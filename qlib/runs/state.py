"""What is known about a strategy from its folder: its status, its record, whether it is up to date, who holds it."""

import fcntl
import json
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Iterator

from qlib.params import Strategy
from qlib.paths import run_folder, write_atomic
from qlib.runs.key import differences, key_of, key_parts
from qlib.runs.lessons import is_lesson, reads
from qlib.runs.provenance import device_class

__all__ = ["State", "state_of", "folder_of", "read_json", "write_status", "hold", "is_held", "Busy", "now"]

ENDED_BADLY = ("failed", "crashed", "timeout", "interrupted")
KILLED = "the runner was killed before the strategy ended"


class Busy(RuntimeError):
    """Another process runs the strategy."""


@dataclass
class State:
    """Where a strategy stands.

    Attributes:
        state: done, out of date, running, failed, crashed, timeout, interrupted, unverified or never run.
        why: what changed, or what went wrong, one line each.
        record: the last good record, also when it is out of date. status: content of status.json.
        parts: what the cache key is made of now.
    """

    state: str
    folder: Path
    why: list[str] = field(default_factory=list)
    record: dict[str, Any] | None = None
    status: dict[str, Any] | None = None
    parts: dict[str, Any] = field(default_factory=dict)


def now() -> str:
    """The time in UTC, to the millisecond: it also tells one start from the next."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


def folder_of(strategy: Strategy, runs: Path) -> Path:
    """The folder of a strategy on the device in use."""
    return run_folder(runs, strategy.model, device_class(), strategy.name)


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None if the file is missing or not whole."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def state_of(strategy: Strategy, root: Path, runs: Path) -> State:
    """Look at the folder of `strategy` and compare its record's key with the present one.

    Raises:
        UserError: the model or the text of the strategy does not exist.
    """
    folder = folder_of(strategy, runs)
    record, status = read_json(folder / "record.json"), read_json(folder / "status.json")
    parts = key_parts(strategy, root)
    if is_lesson(strategy):
        parts["records"] = _records_read(strategy, folder.parent)
    found = State("done", folder, record=record, status=status, parts=parts)
    said = (status or {}).get("state", "done")
    finished_since = record and status and record.get("provenance", {}).get("started") == status.get("started")
    if is_held(folder):
        found.state = "running"
    elif said == "running" and not finished_since:
        found.state, found.why = "crashed", [KILLED]
    elif said in ENDED_BADLY:
        found.state, found.why = said, [status.get("cause") or ""]
    elif record is None:
        found.state = "unverified" if (folder / "result.json").exists() else "never run"
    elif record.get("key") != key_of(found.parts):
        found.state = "out of date" if record.get("key") else "unverified"
        found.why = differences(record.get("key_parts", {}), found.parts)
    return found


def _records_read(lesson: Strategy, beside: Path) -> dict[str, str]:
    """Keys of the finished records that a lesson may read: of its family, model and device, but of no quick check."""
    records = {file.parent.name: read_json(file) or {} for file in beside.glob("*/record.json")}
    return {
        name: record["key"]
        for name, record in sorted(records.items())
        if record.get("key") and record.get("tier") != "smoke" and reads(lesson, str(record.get("family")))
    }


def write_status(folder: Path, state: str, **fields: Any) -> None:
    """Write status.json. Raises OSError, e.g. on a full disk."""
    empty = {"cause": None, "cell": None, "last_lines": [], "started": None, "finished": None, "key": None, "pid": None}
    status = {"state": state} | empty | fields
    write_atomic(folder / "status.json", json.dumps(status, indent=1, ensure_ascii=False) + "\n")


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keep other runners away from `folder`; the lock goes with the process, however it ends.

    Raises:
        Busy: another process holds it.
    """
    with (folder / ".lock").open("w") as file:
        if not _lock(file, fcntl.LOCK_EX):
            raise Busy(f"{folder.name} is being run by another process")
        yield


def is_held(folder: Path) -> bool:
    """True while some process holds `folder`."""
    try:
        with (folder / ".lock").open("r") as file:
            return not _lock(file, fcntl.LOCK_SH)
    except OSError:
        return False


def _lock(file: Any, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks: nothing to wait for
    return True
