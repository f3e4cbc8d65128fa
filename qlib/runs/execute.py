"""Run one strategy or lesson through papermill: it leaves a whole record, or a status that says why not."""

import errno
import json
import logging
import os
import re
import shutil
import sysconfig
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable

from qlib.errors import UserError
from qlib.params import Strategy, to_dict, tool_of
from qlib.paths import write_atomic
from qlib.progress import clock
from qlib.runs.injection import injected
from qlib.runs.kernel import MEMORY_METHOD, Kernel
from qlib.runs.key import SOURCE, key_of
from qlib.runs.lessons import is_lesson, result_of
from qlib.runs.provenance import provenance
from qlib.runs.state import folder_of, hold, now, read_json, write_status
from qlib.runs.subject_hash import model_hash
from qlib.tools.environments import environment_of

__all__ = ["Outcome", "execute", "cause_of"]

STARTS = 3  # a kernel that does not come up (ports taken, machine busy) is started again
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
LAST_LINES = 12
FULL = "disk full"


@dataclass
class Outcome:
    """How a run ended: `state` is done, failed, crashed, timeout or interrupted; `cause` one line.

    `bad_input` tells that the notebook refused what it was given, so that the cause says it all.
    """

    state: str
    cause: str | None = None
    cell: dict[str, Any] | None = None
    last_lines: list[str] = field(default_factory=list)
    seconds: float = 0.0
    bad_input: bool = False


@dataclass
class _Attempt:
    """What the thread that runs papermill has to say."""

    cell: dict[str, Any] | None = None
    begun: bool = False
    error: BaseException | None = None


def execute(
    strategy: Strategy,
    root: Path,
    runs: Path,
    parts: dict[str, Any],
    limit: float | None = None,
    show: Callable[[float, int, int], None] = lambda seconds, cell, cells: None,
) -> Outcome:
    """Run `strategy` and, if it succeeds, put its record in place; an older record outlives a failure.

    Args:
        parts: what the cache key is made of, computed before the start.
        limit: seconds after which the kernel is killed.
        show: called now and then with seconds since the start, number of the cell and of all cells.

    Raises:
        Busy: another process runs it. KeyboardInterrupt: after cleaning up. OSError: the folder cannot be written.
    """
    folder = folder_of(strategy, runs)
    folder.mkdir(parents=True, exist_ok=True)
    parameters = injected(strategy, root)
    with hold(folder):
        work, begun = folder / "work", time.monotonic()
        shutil.rmtree(work, ignore_errors=True)
        status = {"started": now(), "key": key_of(parts), "pid": os.getpid()}
        kernel = None
        try:
            write_status(folder, "running", **status)
            tool = tool_of(strategy)
            python = environment_of(tool, root).python() if tool else None
            work.mkdir()
            kernel = Kernel(work / ".kernel", root, _environment(work, runs, bool(tool)), python)
            outcome = _run(strategy, parameters, root, work, kernel, limit, show)
            if outcome.state == "done":
                record = _complete(strategy, root, work, parts, kernel, status["started"], time.monotonic() - begun)
                _put_in_place(work, folder, record)
        except KeyboardInterrupt:
            outcome = Outcome("interrupted", "interrupted by the user")
        except UserError as error:  # the tool is not installed
            outcome = Outcome("failed", str(error), bad_input=True)
        except (OSError, ValueError) as error:
            outcome = Outcome("failed", cause_of(error))
        finally:
            if kernel is not None:
                kernel.end()
        outcome.seconds = time.monotonic() - begun
        if outcome.state != "done":
            _keep_notebook(work, folder)
        shutil.rmtree(work, ignore_errors=True)
        said = {"cause": outcome.cause, "cell": outcome.cell, "last_lines": outcome.last_lines}
        try:
            write_status(folder, outcome.state, **status, finished=now(), **said)
        except OSError as error:
            outcome.cause = outcome.cause or cause_of(error)
    if outcome.state == "interrupted":
        raise KeyboardInterrupt
    return outcome


def _environment(work: Path, runs: Path, elsewhere: bool) -> dict[str, str]:
    """The kernel imports the package whose sources are in the key, wherever it is started.

    Args:
        elsewhere: it runs in a tool's environment, which lacks the packages whose text is the corpus: it reads ours.
    """
    path = os.pathsep.join(filter(None, [str(SOURCE.parent), os.environ.get("PYTHONPATH")]))
    corpus = {"QLIB_CORPUS": os.pathsep.join(dict.fromkeys(map(sysconfig.get_path, ("purelib", "platlib"))))}
    names = {"QLIB_RUN_DIR": str(work), "QLIB_CACHE": str(runs / "cache"), "PYTHONPATH": path, "PYTHONHASHSEED": "0"}
    return names | (corpus if elsewhere else {})


def _run(strategy, parameters, root, work, kernel, limit, show) -> Outcome:
    """Papermill in a thread, so that this one can watch time, memory and signals."""
    begun = time.monotonic()
    for start in range(1, STARTS + 1):
        attempt = _Attempt()
        arguments = (strategy, parameters, root, work, kernel, attempt)
        thread = threading.Thread(target=_papermill, args=arguments, daemon=True, name=strategy.name)
        thread.start()
        try:
            while thread.is_alive():
                thread.join(0.2)
                kernel.sample_memory()
                seconds = time.monotonic() - begun
                if attempt.cell:
                    show(seconds, attempt.cell["index"] + 1, attempt.cell["cells"])
                if limit is not None and seconds > limit:
                    kernel.end()
                    thread.join(30)
                    return Outcome("timeout", f"took longer than its limit of {clock(limit)}", _public(attempt.cell))
        except KeyboardInterrupt:
            kernel.end()
            thread.join(30)
            raise
        if attempt.error is None:
            return Outcome("done")
        if attempt.begun or start == STARTS or not _may_start_again(attempt.error):
            break
        time.sleep(start)
    return _judge(attempt, kernel)


def _papermill(strategy, parameters, root, work, kernel, attempt: _Attempt) -> None:
    import papermill

    logging.getLogger("papermill").setLevel(logging.CRITICAL)

    def on_cell(cell: Any, cell_index: int, **_: Any) -> None:
        if cell.cell_type == "code":
            attempt.begun = True
            attempt.cell = {"index": cell_index, "id": cell.get("id"), "source": cell.source, "cells": cells}

    try:
        notebook = root / "notebooks" / strategy.notebook
        cells = len(json.loads(notebook.read_text(encoding="utf-8"))["cells"]) + 1
        papermill.execute_notebook(
            _unformatted(notebook),
            _unformatted(work / "notebook.ipynb"),
            parameters,
            kernel_name="python3",
            language="python",
            progress_bar=False,
            kernel_manager_class=kernel.manager_class(),
            on_cell_start=on_cell,
            iopub_timeout=60,
        )
    except BaseException as error:  # handed to the thread that waits
        attempt.error = error


def _unformatted(path: Path) -> str:
    """Papermill formats paths with the parameters: braces are doubled to survive that."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _may_start_again(error: BaseException) -> bool:
    text = str(error)
    return "Address already in use" in text or "Kernel died" in text or "Kernel didn't respond" in text


def _public(cell: dict[str, Any] | None) -> dict[str, Any] | None:
    return {name: cell[name] for name in ("index", "id", "source")} if cell else None


def _judge(attempt: _Attempt, kernel: Kernel) -> Outcome:
    """Say what an exception of papermill means."""
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    error, cell = attempt.error, _public(attempt.cell)
    if isinstance(error, PapermillExecutionError):
        lines = ANSI.sub("", "\n".join(error.traceback)).rstrip().splitlines()
        cause = FULL if _is_full(error) else f"{error.ename}: {error.evalue}".splitlines()[0]
        return Outcome("failed", cause, cell, lines[-LAST_LINES:], bad_input=error.ename == UserError.__name__)
    if isinstance(error, DeadKernelError) or "Kernel died" in str(error):
        log = kernel.log.read_text(errors="replace").splitlines() if kernel.log.exists() else []
        return Outcome("crashed", kernel.death(), cell, [ANSI.sub("", line) for line in log[-LAST_LINES:]])
    return Outcome("failed", cause_of(error), cell)


def _is_full(error: BaseException | None) -> bool:
    while error is not None:
        if getattr(error, "errno", None) == errno.ENOSPC or f"[Errno {errno.ENOSPC}]" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def cause_of(error: BaseException | None) -> str:
    """One line about an exception; a full disk is named, whoever met it."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return FULL if _is_full(error) else f"{type(error).__name__}: {first}"


def _complete(strategy, root, work, parts, kernel, started: str, seconds: float) -> dict[str, Any]:
    """The record: the notebook's result and what only the runner knows.

    Raises:
        ValueError: the notebook ended without a result, or with that of another strategy.
    """
    result = result_of(strategy) if is_lesson(strategy) else read_json(work / "result.json")
    if result is None:
        raise ValueError("the notebook ended without qlib.record(...)")
    if result.get("name") != strategy.name or result.get("params") != to_dict(strategy):
        raise ValueError("the result is not of this strategy: the notebook changed its parameters")
    if str(parts["model"]).startswith("hub "):  # the first run is what fetches it
        parts = parts | {"model": model_hash(strategy.model, root)}
    packages = result.get("details", {}).get("tool", {}).get("versions")
    return result | {
        "key": key_of(parts),
        "key_parts": parts,
        "duration_seconds": round(seconds, 3),
        "peak_memory_bytes": {"value": kernel.peak_bytes, "method": MEMORY_METHOD},
        "provenance": provenance(strategy.seed, started, now()) | ({"packages": packages} if packages else {}),
    }


def _put_in_place(work: Path, folder: Path, record: dict[str, Any]) -> None:
    """Move everything the run left into the strategy's folder, the record last: it is what says "done"."""
    write_atomic(work / "record.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    _without_paths(work / "notebook.ipynb", f"notebooks/{record['params']['notebook']}")
    for name in ("result.json", ".kernel"):
        shutil.rmtree(work / name) if (work / name).is_dir() else (work / name).unlink(missing_ok=True)
    new = {entry.name for entry in work.iterdir()}
    for old in folder.iterdir():
        if old.name not in {"work", ".lock", "status.json", "record.json"} and (old.is_dir() or old.name not in new):
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    for name in sorted(new - {"record.json"}) + ["record.json"]:
        os.replace(work / name, folder / name)


def _without_paths(notebook: Path, source: str) -> None:
    """Papermill notes the absolute paths of this machine; the published notebook says which notebook it was."""
    content = json.loads(notebook.read_text(encoding="utf-8"))
    content["metadata"].setdefault("papermill", {}).update(input_path=source, output_path=notebook.name)
    write_atomic(notebook, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _keep_notebook(work: Path, folder: Path) -> None:
    """Leave the notebook as far as it got beside the status, for a look at what went wrong."""
    if read_json(work / "notebook.ipynb") is not None:
        os.replace(work / "notebook.ipynb", folder / "failed.ipynb")
