"""llama.cpp in a process of its own, taking turns with what is timed here."""

import json
import time
from contextlib import contextmanager, suppress
from typing import Any, Iterator

import numpy as np

from qlib.errors import UserError
from qlib.tools.llama_client import start

__all__ = ["Guest", "llama"]

PAUSE = 0.02  # seconds in which the threads of the one that ran before go to sleep


class Guest:
    """Something timed elsewhere, called like a layer: each call is one round there."""

    def __init__(self, process: Any) -> None:
        self.process = process
        self.about = self._hear()
        self.rounds: dict[str, list[dict[str, float]]] = {"decode": [], "prefill": []}

    def ask(self, phase: str) -> None:
        """One round.

        Raises:
            UserError: the process has ended.
        """
        time.sleep(PAUSE)
        with suppress(BrokenPipeError):  # it has ended: hearing nothing says so
            self.process.stdin.write(f"{phase}\n")
            self.process.stdin.flush()
        self.rounds[phase].append(self._hear())
        time.sleep(PAUSE)

    def _hear(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            raise UserError((self.process.stderr.read().strip().splitlines() or [f"llama.cpp: ended with code {code}"])[-1])
        return json.loads(line)

    def milliseconds(self, phase: str, kind: str, last: int) -> np.ndarray:
        """Of the last rounds. What a call costs beside the layer, where that was timed, is taken off."""
        return np.array([one[kind] - one.get("rest", 0.0) for one in self.rounds[phase][-last:]])


@contextmanager
def llama(function: str, **arguments: Any) -> Iterator[Guest]:
    """Start a timing of `qlib.tools.llama_calls` that waits for its turns.

    Raises:
        UserError: llama.cpp is not installed, or fails.
    """
    process = start((function, arguments | {"rounds": 0}))
    try:
        yield Guest(process)
    finally:
        with suppress(BrokenPipeError):
            process.stdin.close()
        process.wait(timeout=60)
