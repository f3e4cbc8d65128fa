"""llama.cpp's low-level interface: load a GGUF file and run token ids through it. Needs llama.cpp's environment."""

import ctypes
from pathlib import Path

import llama_cpp
import numpy as np
import torch

from qlib.errors import UserError
from qlib.layers.build import call, missing

__all__ = ["Session", "failed", "messages", "start"]

#: The shape that llama.cpp gave the tile registers of a processor with AMX; all 0: none.
TILES = torch.zeros(64, dtype=torch.uint8)
#: Warnings and errors so far.
messages: list[str] = []


@llama_cpp.llama_log_callback
def _listen(level: int, text: bytes, _) -> None:
    if level >= 3:  # warnings, errors, and what continues them
        messages.append(text.decode("utf-8", "replace").strip())


def start() -> None:
    """Open the library and listen to it instead of letting it print."""
    llama_cpp.llama_log_set(_listen, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()


def failed(what: str) -> UserError:
    """An error with what llama.cpp said last."""
    return UserError(f"llama.cpp: {what}: {' '.join(filter(None, messages[-3:])) or 'it does not say why'}")


class Session:
    """A model with one context and one batch, freed together.

    Args:
        file: a GGUF file. tokens: length of the context. threads: for decode and prefill.
        exact: attention in fp32, instead of llama.cpp's usual fp16 for keys and values.
    """

    def __init__(self, file: str | Path, tokens: int, threads: int, exact: bool = False) -> None:
        start()
        self.model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise failed(f"cannot load {file}")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = options.n_batch = tokens
        options.n_outputs_max_per_seq = 0  # as many as asked for
        options.n_threads = options.n_threads_batch = threads
        if exact:
            options.type_k = options.type_v = llama_cpp.GGML_TYPE_F32
            options.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        if not self.context:
            raise failed(f"cannot make a context of {tokens} tokens")
        self.tokens = tokens
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(tokens, 0, 1)
        parts = (self.batch.token, self.batch.pos, self.batch.n_seq_id, self.batch.logits)
        self.ids, self.positions, counts, self.wanted = (np.ctypeslib.as_array(part, (tokens,)) for part in parts)
        counts[:] = 1
        for index in range(tokens):
            self.batch.seq_id[index][0] = 0

    def run(self, ids: np.ndarray, start: int = 0, keep: int = 1) -> None:
        """Compute `ids [tokens]` behind `start` cached tokens; logits of the last `keep`."""
        count = len(ids)
        self.batch.n_tokens = count
        self.ids[:count] = ids
        self.positions[:count] = np.arange(start, start + count)
        self.wanted[:count] = np.arange(count) >= count - keep
        # It shapes the registers once in a thread and takes it that they stay so. Torch, where it ran in between, has released
        # them, and the next tile instruction would end the process.
        if not missing():
            call("restore_tiles", TILES)
        code = llama_cpp.llama_decode(self.context, self.batch)
        if not missing():
            call("keep_tiles", TILES)
        if code:
            raise failed(f"decoding {count} tokens failed with code {code}")
        llama_cpp.llama_synchronize(self.context)

    def forget(self, start: int = 0) -> None:
        """Drop the cached tokens from `start` on."""
        llama_cpp.llama_memory_seq_rm(self.memory, 0, start, -1)

    def close(self) -> None:
        llama_cpp.llama_batch_free(self.batch)
        llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)
