"""Whether a tool got a fair run: the ids that reached it, its runtime on the uncompressed model, the spread of repeats.

Runs in the tool's environment.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qlib.evaluate.logits import ModelLogits
from qlib.evaluate.precision import in_float32
from qlib.evaluate.quality import score_windows
from qlib.quantize.tool import Options
from qlib.tools.about import adapter
from qlib.tools.adapter import Quantized
from qlib.tools.witness import hash_rows

__all__ = ["compare_runtimes", "digest", "ids_that_reached", "quantize_repeatedly"]

LEAST, MOST, BUDGET = 2, 3, 60.0  # runs, and seconds after which none beyond the least begins
WINDOWS = 16


def quantize_repeatedly(folder: Path, ids: torch.Tensor, options: Options) -> tuple[Quantized, list[dict[str, Any]]]:
    """The result of the first run, and of every run its seconds and a digest of what came out."""
    kept, runs = None, []
    while len(runs) < LEAST or (len(runs) < MOST and sum(run["seconds"] for run in runs) < BUDGET):
        found = adapter(options.name).quantize(folder, ids.clone(), options)
        runs.append({"seconds": found.seconds, "digest": digest(found, ids)})
        kept = kept or found
    return kept, runs


def digest(found: Quantized, ids: torch.Tensor) -> str:
    """SHA-256 of the values of all weights; of logits where only the tool's own kernels tell."""
    values = [found.weights[name] for name in sorted(found.weights)] or [found.runtime(ids[:1], 16)]
    total = hashlib.sha256()
    for value in values:
        total.update(value.detach().float().contiguous().numpy().tobytes())
    return total.hexdigest()


def ids_that_reached(found: Quantized, ids: torch.Tensor, options: Options) -> dict[str, Any]:
    """Hash of the ids that were given and of those that reached the tool, and whether they agree.

    `same` is null where the setting reads no text and none reached it; false where it should read and none was seen.
    """
    given = hash_rows(ids)
    compared = options.reads_text or found.seen is not None
    return {"given": given, "reached": found.seen, "same": found.seen == given if compared else None}


def compare_runtimes(folder: Path, model: torch.nn.Module, ids: torch.Tensor, options: Options) -> dict[str, Any] | None:
    """Perplexity of some windows by the uncompressed model in the tool's own runtime, and in torch by ours.

    Returns:
        its, ours, tokens; None if the adapter opens no runtime.
    """
    open_runtime = getattr(adapter(options.name), "open_runtime", None)
    if open_runtime is None:
        return None
    windows = [row.tolist() for row in ids[:WINDOWS, 1:]]
    start = int(ids[0, 0])
    its = score_windows(open_runtime(folder, None), windows, start)
    with in_float32(model):
        ours = score_windows(ModelLogits(model), windows, start)
    perplexity = {name: float(np.exp(one.nll.sum() / one.tokens.sum())) for name, one in (("its", its), ("ours", ours))}
    return perplexity | {"tokens": int(ours.tokens.sum())}
