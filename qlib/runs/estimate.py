"""How long strategies will take and how much memory, from what they took before."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlib.params import Strategy
from qlib.paths import slug
from qlib.progress import clock
from qlib.runs.state import read_json

__all__ = ["Estimate", "estimate", "announce", "available_memory", "gigabytes"]

HERE, PUBLISHED = "earlier runs here", "published runs on another machine"
#: Where a container says how much memory it may use, and how much it uses.
CGROUP = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current"))


@dataclass
class Estimate:
    """Seconds and peak bytes of one strategy and where they come from; None where nothing is known."""

    name: str
    seconds: float | None = None
    bytes: int | None = None
    source: str = ""


def estimate(strategy: Strategy, record: dict[str, Any] | None, published: Path, comment: str) -> Estimate:
    """Take the last record of this machine, else the published one, else the words of the strategy's file."""
    theirs = read_json(published / "records" / strategy.name / "record.json")
    if theirs and theirs.get("model") != slug(strategy.model):
        theirs = None
    for found, source in ((record, HERE), (theirs, PUBLISHED)):
        if found and found.get("duration_seconds"):
            peak = (found.get("peak_memory_bytes") or {}).get("value")
            return Estimate(strategy.name, found["duration_seconds"], peak, source)
    return Estimate(strategy.name, source=comment)


def announce(estimates: list[Estimate]) -> list[str]:
    """Lines to print before a run: time and memory, what they rest on, and a warning if memory will not do."""
    known = [one for one in estimates if one.seconds]
    lines = []
    if known:
        rests = " and ".join(sorted({one.source for one in known}))
        peak = max((one.bytes or 0 for one in known), default=0)
        memory = f" and {gigabytes(peak)} of memory" if peak else ""
        lines.append(f"about {clock(sum(one.seconds for one in known))}{memory}, from {rests}")
        free = available_memory()
        if free is not None and peak > free:
            heavy = max(known, key=lambda one: one.bytes or 0).name
            lines.append(f"warning: {heavy} took {gigabytes(peak)} of memory, {gigabytes(free)} are free")
    for one in estimates:
        if not one.seconds:
            lines.append(f"{one.name}: not run before{'; its file says: ' + one.source if one.source else ''}")
    return lines


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def available_memory() -> int | None:
    """Bytes that may be used now: of the machine, or of the container if that allows less."""
    import psutil

    free = psutil.virtual_memory().available
    try:
        most, used = (int(file.read_text()) for file in CGROUP)
    except (OSError, ValueError):
        return free
    return min(free, most - used)
