"""A tool in a process of its own, taking turns with what is timed here."""

import json
import select
import subprocess
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Iterator

import numpy as np

from qlib.errors import UserError
from qlib.quantize.tool import Options
from qlib.tools.environments import environment_of
from qlib.tools.llama_client import start
from qlib.tools.run import environment

__all__ = ["Guest", "llama", "tool"]

PAUSE = 0.02  # seconds in which the threads of the one that ran before go to sleep


class Guest:
    """Something timed elsewhere, called like a layer: each call is one round there.

    Args:
        errors: where it writes what it complains of. limit: seconds that an answer may take.
    """

    def __init__(self, process: Any, name: str = "llama.cpp", errors: Any = None, limit: float = 900) -> None:
        self.process, self.name, self.limit = process, name, limit
        self.errors = process.stderr if errors is None else errors
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
        if not select.select([self.process.stdout], [], [], self.limit)[0]:
            self.process.kill()
            raise UserError(f"{self.name}: did not answer within {self.limit:.0f} s")
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            if self.errors.seekable():
                self.errors.seek(0)
            raise UserError((self.errors.read().strip().splitlines() or [f"{self.name}: ended with code {code}"])[-1])
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


@contextmanager
def tool(options: Options, layer: Path, rest: Path, context: int, prompt: int, threads: int, vocab: int) -> Iterator[Guest]:
    """Start a timing of `qlib.tools.timing` that waits for its turns.

    Raises:
        UserError: the tool is not installed, or fails; its words.
    """
    request = {"name": options.name, "options": asdict(options), "layer": str(layer), "rest": str(rest)}
    request |= {"context": context, "prompt": prompt, "threads": threads, "vocab": vocab}
    command = [str(environment_of(options.name).python()), "-m", "qlib.tools.timing", json.dumps(request)]
    with tempfile.TemporaryDirectory() as place, tempfile.TemporaryFile("w+", errors="replace") as errors:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
        process = subprocess.Popen(command, cwd=place, env=environment(threads), text=True, **pipes)
        try:
            yield Guest(process, options.name, errors)
        finally:
            with suppress(BrokenPipeError):
                process.stdin.close()
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
