"""Call functions of `qlib.tools.llama_calls`, which runs in llama.cpp's environment, from any other."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from qlib.errors import UserError
from qlib.tools.environments import environment_of

__all__ = ["call", "call_all", "start"]


def start(*calls: tuple[str, dict[str, Any]]) -> subprocess.Popen:
    """Start calls, function and arguments each, in a process whose standard input and output are pipes.

    A timing with ``rounds=0`` answers line by line: write "decode" or "prefill", read one round.

    Raises:
        UserError: llama.cpp is not installed.
    """
    python, source = environment_of("llama-cpp").python(), Path(__file__).parents[2]
    words = [word for name, arguments in calls for word in (name, json.dumps(arguments, default=str))]
    environment = os.environ | {"PYTHONPATH": str(source)}
    pipe = subprocess.PIPE
    command = [str(python), "-m", "qlib.tools.llama_calls", *words]
    return subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def call_all(*calls: tuple[str, dict[str, Any]]) -> list[Any]:
    """What functions return that are called one after the other in one process.

    Raises:
        UserError: llama.cpp is not installed, or one of them failed; its words.
    """
    process = start(*calls)
    out, error = process.communicate()
    if process.returncode:
        raise UserError((error.strip().splitlines() or [f"llama.cpp: ended with code {process.returncode}"])[-1])
    return [json.loads(line) for line in out.splitlines()]


def call(function: str, **arguments: Any) -> Any:
    """What one function returns; see `call_all`."""
    return call_all((function, arguments))[0]
