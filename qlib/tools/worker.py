"""What runs in a tool's environment: quantize, keep the weights, score. See `qlib.tools.run` for the other side.

    .tools/gptqmodel/bin/python -m qlib.tools.worker folder/request.json
"""

import json
import os
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from qlib.errors import UserError
from qlib.evaluate.baseline import answer
from qlib.paths import write_atomic
from qlib.quantize.tool import Options
from qlib.tools.about import adapter
from qlib.tools.adapter import load_model, put_weights, versions
from qlib.tools.exam import read_exam
from qlib.tools.fairness import compare_runtimes
from qlib.tools.runtime import RuntimeModel

__all__ = ["main", "work"]


def work(request: dict[str, Any]) -> dict[str, Any]:
    """Do what a request asks for, and return what stands in result.json beside it.

    Args:
        request: ``model`` and ``folder`` (paths), ``options`` of the pass, ``ids`` (npz with `ids [samples, length]`),
            ``exam`` (an npz, or null), ``weights`` (whether to write them).
    """
    folder, options = Path(request["folder"]), Options(**request["options"])
    with np.load(request["ids"]) as stored:
        ids = torch.from_numpy(stored["ids"].astype(np.int64))
    found = adapter(options.name).quantize(Path(request["model"]), ids, options)
    result = {
        "seconds": found.seconds,
        "bits_per_weight": found.bits_per_weight,
        "settings": found.settings,
        "versions": versions(options.name),
        "threads": torch.get_num_threads(),
        "seen": found.seen,
    }
    if request.get("weights"):
        from safetensors.torch import save

        write_atomic(folder / "weights.safetensors", save({f"{n}.weight": w for n, w in found.weights.items()}))
    if request.get("exam"):
        exam, model = read_exam(Path(request["exam"])), load_model(Path(request["model"])).requires_grad_(False)
        result["uncompressed"] = compare_runtimes(Path(request["model"]), model, ids, options)
        put_weights(model, found.weights)
        if not found.weights:
            model = RuntimeModel(found.runtime, model)
        answers = answer(SimpleNamespace(model=model), exam.items, exam.texts, exam.start)
        partial = folder / f"items.tmp-{os.getpid()}.npz"
        np.savez(partial, **vars(answers))
        os.replace(partial, folder / "items.npz")
    return result


def main(path: str) -> int:
    """Answer one request; an error of the tool is written down as it is."""
    request = json.loads(Path(path).read_text(encoding="utf-8"))
    try:
        result = work(request)
    except Exception as error:  # whatever a tool raises is its result
        traceback.print_exc()
        kind = type(error).__name__
        result = {"error": {"kind": kind, "text": str(error), "refused": isinstance(error, UserError)}}
    write_atomic(Path(request["folder"]) / "result.json", json.dumps(result, default=str, indent=1) + "\n")
    return 1 if "error" in result else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
