"""llama.cpp's speed at true shapes, with random weights. Needs its environment."""

import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Mapping, Sequence

import llama_cpp
import numpy as np

from qlib.errors import UserError
from qlib.export.gguf_file import block_bits, write_random
from qlib.models.shapes import find_shape
from qlib.tools.llama_session import Session

__all__ = ["Timer", "time_layer", "time_model"]

PHASES = ("decode", "prefill")
STEPS = 4  # decode calls of a round
WARM_ROUNDS = 2


class Timer:
    """Rounds of several GGUF files, taken in turns.

    Args:
        files: label -> file. prompt: tokens of a prefill. context: tokens cached before the one that is decoded.
    """

    def __init__(self, files: Mapping[str, Path], threads: int, prompt: int, context: int) -> None:
        self.prompt, self.context, self.turn = prompt, context, 0
        self.sessions = {name: Session(file, max(prompt, context + 1), threads) for name, file in files.items()}
        self.ids = np.arange(max(prompt, context)) % min(one.vocab for one in self.sessions.values())

    def round(self, phase: str) -> dict[str, float]:
        """Milliseconds of a "decode" step or a "prefill" by label, in an order that turns round every time."""
        if phase not in PHASES:
            raise UserError(f"phase: '{phase}' is unknown; allowed: {', '.join(PHASES)}")
        self.turn += 1
        names = list(self.sessions)
        return {name: getattr(self, f"_{phase}")(self.sessions[name]) for name in names[:: 1 if self.turn % 2 else -1]}

    def _decode(self, session: Session) -> float:
        """Mean of some steps behind a context that is filled anew where a prefill has overwritten it."""
        if llama_cpp.llama_memory_seq_pos_max(session.memory, 0) != self.context - 1:
            session.forget()
            session.run(self.ids[: self.context])
        spent = 0.0
        for _ in range(STEPS):
            begun = time.perf_counter()
            session.run(self.ids[:1], self.context)
            spent += time.perf_counter() - begun
            session.forget(self.context)
        return 1e3 * spent / STEPS

    def _prefill(self, session: Session) -> float:
        session.forget()
        begun = time.perf_counter()
        session.run(self.ids[: self.prompt])
        spent = time.perf_counter() - begun
        session.forget()
        return 1e3 * spent

    def close(self) -> None:
        for session in self.sessions.values():
            session.close()


def time_layer(
    model: str, kinds: Sequence[str], threads: int = 2, prompt: int = 256, context: int = 256, rounds: int = 10
) -> dict[str, Any]:
    """Time one decoder layer at its true shape with random weights.

    Each kind is a file of one true layer and a vocabulary of 32. "rest" is such a file of F16 whose layer is as narrow
    as can be (one head, FFN of 32): what a call costs beside the layer. Take it off to favour llama.cpp.

    Args:
        model: a name that `qlib.models.shapes` knows. kinds: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, F16, BF16, MXFP4.
        rounds: behind each figure; 0: answer lines of standard input, see the module.

    Returns:
        decode_ms, prefill_ms: label -> one number for each round. bytes: label -> size of the file.
    """
    shape = replace(find_shape(model), layers=1, vocab=32, tied=True)
    rest = replace(shape, heads=1, kv_heads=1, ffn=32)
    files = {kind: (shape, kind, "F16") for kind in kinds} | {"rest": (rest, "F16", "F16")}
    return _time(files, threads, prompt, context, rounds)


def time_model(
    model: str, kinds: Sequence[str], threads: int = 2, prompt: int = 256, context: int = 256, rounds: int = 10
) -> dict[str, Any]:
    """Time a whole model at its true shape with random weights, as `time_layer`.

    Embedding and head are Q8_0 where the linears are quantized: what llama.cpp itself takes for Q4_0 where the hidden
    size is no multiple of 256 (else Q6_K), and the type of the linears otherwise.
    """
    shape = find_shape(model)
    heads = {kind: kind if kind in ("F16", "BF16") else "Q8_0" for kind in kinds}
    return _time({kind: (shape, kind, heads[kind]) for kind in kinds}, threads, prompt, context, rounds)


def _time(wanted: Mapping[str, tuple], threads: int, prompt: int, context: int, rounds: int) -> dict[str, Any]:
    """Write the files into a temporary folder, and time them or answer standard input."""
    with tempfile.TemporaryDirectory() as folder:
        files = {label: Path(folder) / f"{label}.gguf" for label in wanted}
        for label, (shape, kind, head) in wanted.items():
            write_random(files[label], shape, kind, head)
        timer = Timer(files, threads, prompt, context)
        result: dict[str, Any] = {
            "bits_per_weight": {label: block_bits(file) for label, file in files.items()},
            "bytes": {label: file.stat().st_size for label, file in files.items()},
            "heads": {label: head for label, (_, _, head) in wanted.items()},
            "conditions": f"llama.cpp through llama-cpp-python {llama_cpp.__version__}, {threads} threads, batch 1, "
            f"prompt {prompt}, context {context}; random weights",
        }
        if not rounds:
            print(json.dumps(result), flush=True)
            for line in sys.stdin:
                print(json.dumps(timer.round(line.strip())), flush=True)
        for phase in PHASES if rounds else ():
            for _ in range(WARM_ROUNDS):
                timer.round(phase)
            counted = [timer.round(phase) for _ in range(rounds)]
            result[f"{phase}_ms"] = {label: [one[label] for one in counted] for label in files}
        timer.close()
    return result
