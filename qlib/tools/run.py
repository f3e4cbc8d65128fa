"""Let a tool quantize and be scored, from here: a request, a worker in the tool's environment, its result."""

import json
import os
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qlib.errors import UserError
from qlib.evaluate.baseline import Answers
from qlib.paths import write_atomic
from qlib.quantize.tool import Options
from qlib.tools.environments import environment_of
from qlib.tools.exam import Exam, write_exam

__all__ = ["ToolResult", "environment", "run_tool"]

LAST_LINES = 6
ANSWERS = ("inside", "alone", "nll", "tokens")


@dataclass(frozen=True)
class ToolResult:
    """What a worker found.

    Attributes:
        seconds: of the quantization step alone. bits_per_weight: of the quantized linears, in the tool's format.
        settings: what the tool was told and decides the result. versions: of the tool and of what computes for it.
        threads: of torch in the worker. seen: hash of the ids that reached the tool; None: it reads none.
        uncompressed: see `qlib.tools.fairness.compare_runtimes`.
        answers: to the exam, None without one. weights: safetensors file with the dequantized fp32 weights, or None.
    """

    seconds: float
    bits_per_weight: float
    settings: dict[str, Any]
    versions: dict[str, str]
    threads: int
    seen: str | None = None
    uncompressed: dict[str, Any] | None = None
    answers: Answers | None = None
    weights: Path | None = None


def run_tool(
    options: Options,
    model: Path,
    ids: torch.Tensor,
    exam: Exam | None = None,
    folder: Path | None = None,
    limit: float | None = None,
    threads: int | None = None,
) -> ToolResult:
    """Let `options.name` quantize the model of a folder.

    Args:
        ids: calibration token ids `[samples, length]`.
        exam: what the result is asked (see `qlib.tools.exam.make_exam`).
        folder: keeps request, log, answers and the dequantized weights there; None: nothing is kept.
        limit: seconds after which the worker is killed.
        threads: of the worker; None: as this process.

    Raises:
        UserError: the tool is not installed, does not support a setting, failed, or took too long; its own words.
    """
    python = environment_of(options.name).python()
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(folder or temporary).resolve()
        place.mkdir(parents=True, exist_ok=True)
        for stale in ("result.json", "items.npz", "weights.safetensors"):
            (place / stale).unlink(missing_ok=True)
        request = {"model": str(Path(model).resolve()), "folder": str(place), "ids": str(place / "ids.npz")}
        request |= {"options": asdict(options), "exam": None, "weights": folder is not None}
        np.savez(place / "ids.npz", ids=ids.numpy())
        if exam:
            request["exam"] = str(place / "exam.npz")
            write_exam(exam, place / "exam.npz")
        write_atomic(place / "request.json", json.dumps(request, indent=1))
        _work(python, place, options.name, limit, threads)
        result = json.loads((place / "result.json").read_text(encoding="utf-8"))
        answers = None
        if exam:
            with np.load(place / "items.npz") as stored:
                answers = Answers(*(stored[name] for name in ANSWERS))
        return ToolResult(**result, answers=answers, weights=place / "weights.safetensors" if folder else None)


def environment(threads: int | None = None) -> dict[str, str]:
    """Variables of a process in a tool's environment: as many threads as here, no network, this package."""
    count = str(threads or torch.get_num_threads())
    fixed = {"OMP_NUM_THREADS": count, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return os.environ | fixed | {"PYTHONPATH": str(Path(__file__).parents[2])}


def _work(python: Path, place: Path, name: str, limit: float | None, threads: int | None) -> None:
    """Run the worker; its result stands in `place`.

    Raises:
        UserError: it failed or was killed, with what the tool said.
    """
    command = [str(python), "-m", "qlib.tools.worker", str(place / "request.json")]
    with (place / "worker.log").open("wb") as log:
        try:
            code = subprocess.run(
                command, cwd=place, env=environment(threads), stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=limit
            ).returncode
        except subprocess.TimeoutExpired:
            raise UserError(f"{name}: took longer than its limit of {limit:g} seconds") from None
    result = place / "result.json"
    error = json.loads(result.read_text(encoding="utf-8")).get("error") if result.is_file() else None
    if error:
        kind = "" if error["refused"] else f"{error['kind']}: "
        raise UserError(f"{name}: {kind}{(error['text'].strip() or 'it does not say why').splitlines()[0]}")
    if code or not result.is_file():
        last = (place / "worker.log").read_text(errors="replace").splitlines()[-LAST_LINES:]
        raise UserError("\n    ".join([f"{name}: its worker ended with code {code}", *last]))
