"""llama.cpp as a yardstick: its logits for our scorer, its own quantization, its speed. Runs in its own environment.

    .tools/llama-cpp/bin/python -m qlib.tools.llama_calls time_layer '{"model": "qwen-72b", "kinds": ["Q4_0"]}'

calls a function, or several, and prints what each returns as a line of JSON: `qlib.tools.llama_client` does that from
elsewhere. A timing with ``"rounds": 0`` waits for lines "decode" or "prefill" and answers each with one round, so that
others can take turns with it.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import torch

from qlib.errors import UserError
from qlib.evaluate.quality import score_items, score_windows
from qlib.tools.exam import read_exam
from qlib.tools.llama_quantize import dequantize, quantize
from qlib.tools.llama_runtime import LlamaRuntime
from qlib.tools.llama_session import failed, messages, start
from qlib.tools.llama_timing import time_layer, time_model

__all__ = ["answer", "dequantize", "logits", "quantize", "time_layer", "time_model", "tokenize"]


def logits(
    file: str | Path, ids: str | Path, target: str | Path, threads: int = 1, exact: bool = False
) -> dict[str, Any]:
    """Read token ids `[rows, tokens]` and write the logits of every position, fp32 `[rows, tokens, vocabulary]`.

    Args:
        ids, target: npy files.
    """
    rows = torch.from_numpy(np.load(ids))
    logits_of = LlamaRuntime(file, rows.shape[1], threads, exact)
    np.save(target, logits_of(rows, rows.shape[1]).numpy())
    logits_of.close()
    return {"warnings": [line for line in messages if line]}


def answer(file: str | Path, exam: str | Path, target: str | Path, threads: int = 1) -> dict[str, float]:
    """Let a GGUF file answer an exam (`qlib.tools.exam`): the scorer is ours, the logits are llama.cpp's.

    Args:
        target: an npz file that gets the arrays of `qlib.evaluate.baseline.Answers`.

    Returns:
        perplexity, of the windows; and seconds.
    """
    asked, begun = read_exam(Path(exam)), time.perf_counter()
    longest = max(map(len, [*asked.texts, *(item.context + item.options[0] for item in asked.items)]))
    logits_of = LlamaRuntime(file, 1 + longest, threads)
    try:
        inside, alone = score_items(logits_of, asked.items, asked.start)
        scores = score_windows(logits_of, asked.texts, asked.start)
    finally:
        logits_of.close()
    np.savez(target, inside=inside, alone=alone, nll=scores.nll, tokens=scores.tokens)
    return {"perplexity": float(np.exp(scores.nll.sum() / scores.tokens.sum())), "seconds": time.perf_counter() - begun}


def tokenize(file: str | Path, text: str) -> list[int]:
    """Token ids of `text` by the tokenizer of a GGUF file, special tokens as plain text."""
    start()
    options = llama_cpp.llama_model_default_params()
    options.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(file).encode(), options)
    if not model:
        raise failed(f"cannot load {file}")
    raw = text.encode()
    found = (llama_cpp.llama_token * (len(raw) + 1))()
    vocab = llama_cpp.llama_model_get_vocab(model)
    count = llama_cpp.llama_tokenize(vocab, raw, len(raw), found, len(found), False, False)
    llama_cpp.llama_model_free(model)
    return list(found[:count])


if __name__ == "__main__":
    calls = {call.__name__: call for call in (answer, dequantize, logits, quantize, time_layer, time_model, tokenize)}
    try:
        for name, arguments in zip(sys.argv[1::2], sys.argv[2::2]):
            print(json.dumps(calls[name](**json.loads(arguments))), flush=True)
    except UserError as error:
        sys.exit(str(error))
