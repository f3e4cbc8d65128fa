"""Run a program with a limit on its memory, in a control group of the kernel, where one can be made."""

import os
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qlib.errors import UserError

__all__ = ["Limited", "run_limited"]

#: For both versions of control groups: the folder of memory, its limit, and the highest use so far.
VERSIONS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.peak"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.max_usage_in_bytes"),
)


@dataclass(frozen=True)
class Limited:
    """What came of a program.

    Attributes:
        output: what it printed. killed: by the kernel, for it needed more than the limit.
        peak: bytes the group had in use at most, page cache included; None where no group could be made.
    """

    output: str
    killed: bool
    peak: int | None


def run_limited(command: Sequence[str], limit: int, environment: dict[str, str] | None = None) -> Limited:
    """Run `command` within `limit` bytes, pages of files it reads and writes included: those the kernel may drop.

    Without the right to make a control group it runs without a limit, and `peak` is None.

    Raises:
        UserError: it ended with an error of its own.
    """
    group, told = _make_group(limit)
    try:
        join = None if group is None else lambda: (group / "cgroup.procs").write_text(str(os.getpid()))
        done = subprocess.run(command, env=environment, preexec_fn=join, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if done.returncode not in (0, -signal.SIGKILL):
            raise UserError(f"{' '.join(command[:4])}: ended with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
        return Limited(done.stdout, done.returncode != 0, None if group is None else int((group / told).read_text()))
    finally:
        if group is not None:
            group.rmdir()


def _make_group(limit: int) -> tuple[Path | None, str]:
    """A new group and the name of the file that tells its peak; (None, "") where the system allows none."""
    for folder, maximum, peak in VERSIONS:
        group = folder / f"qlib-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        if (group / maximum).is_file() and (group / peak).is_file():
            try:
                (group / maximum).write_text(str(limit))
                return group, peak
            except OSError:
                pass
        group.rmdir()
    return None, ""
