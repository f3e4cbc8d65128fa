"""A tool's speed in its own runtime, one layer of true shape. Runs in its environment and waits for its turns.

    .tools/torchao/bin/python -m qlib.tools.timing '{"options": {...}, "layer": "folder", "rest": "folder"}'

answers each line "decode" or "prefill" of standard input with a line of JSON: milliseconds of the layer's model, and of
"rest", the same model with a layer as narrow as can be: what a call costs beside the layer.
"""

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlib.errors import UserError
from qlib.quantize.tool import Options
from qlib.tools.about import about, adapter
from qlib.tools.adapter import versions
from qlib.tools.runtime import Runtime

__all__ = ["Turns", "main"]

STEPS = 4  # decode calls of a round
LONGER = 64  # tokens by which the cache may outgrow its context before it is filled anew


@dataclass
class Turns:
    """Rounds of one runtime.

    Attributes:
        context: tokens cached before the one that is decoded. prompt: of a prefill. vocab: ids are below it.
        cached: how many tokens lie in the cache; -1: another number than decoding wants.
    """

    runtime: Runtime
    context: int
    prompt: int
    vocab: int
    cached: int = -1

    def ids(self, count: int) -> torch.Tensor:
        return torch.arange(count) % self.vocab

    def decode(self) -> float:
        """Milliseconds of a step, the mean of some behind a context."""
        if not self.context <= self.cached < self.context + LONGER:
            self.runtime.prefill(self.ids(self.context))
            self.cached = self.context
            self.runtime.decode(self.ids(1))  # the first step behind a prefill may allocate
        begun = time.perf_counter()
        for _ in range(STEPS):
            self.runtime.decode(self.ids(1))
        self.cached += STEPS
        return 1e3 * (time.perf_counter() - begun) / STEPS

    def prefill(self) -> float:
        self.cached = -1
        begun = time.perf_counter()
        self.runtime.prefill(self.ids(self.prompt))
        return 1e3 * (time.perf_counter() - begun)


def main(request: dict[str, Any]) -> None:
    """Load both models, say so, and answer standard input until it ends.

    Args:
        request: ``options`` of the pass (null: uncompressed), ``name`` of the tool, ``layer`` and ``rest`` (folders),
            ``threads``, ``context``, ``prompt``, ``vocab``.
    """
    torch.set_num_threads(request["threads"])
    name, options = request["name"], request["options"]
    own = Options(**options) if options else None
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a tool's chatter is no answer, even if C wrote it
    if not hasattr(adapter(name), "open_runtime"):
        raise UserError(f"{name}: has no runtime on this kind of device")
    begun = time.perf_counter()
    opened = {part: adapter(name).open_runtime(Path(request[part]), own) for part in ("layer", "rest")}
    seconds = time.perf_counter() - begun
    turns = {k: Turns(one, request["context"], request["prompt"], request["vocab"]) for k, one in opened.items()}
    told = {"versions": versions(name), "threads": torch.get_num_threads(), "runtime": about(name).runtime}
    print(json.dumps(told | {"seconds": seconds}), file=answers, flush=True)
    for line in map(str.strip, sys.stdin):
        if line not in ("decode", "prefill"):
            raise UserError(f"phase: '{line}' is unknown; allowed: decode, prefill")
        print(json.dumps({part: getattr(one, line)() for part, one in turns.items()}), file=answers, flush=True)


if __name__ == "__main__":
    try:
        main(json.loads(sys.argv[1]))
    except UserError as error:
        sys.exit(str(error))
