"""A GGUF file in llama.cpp's kernels: logits for our scorer, and steps behind a cache. Needs its environment."""

import tempfile
from pathlib import Path

import llama_cpp
import numpy as np
import torch

from qlib.errors import UserError
from qlib.export.gguf import export
from qlib.models.load import Source, Subject
from qlib.tools.adapter import load_model
from qlib.tools.llama_random import shape_of_config, write_kind
from qlib.tools.llama_session import Session

__all__ = ["LlamaRuntime", "open_exact", "open_random"]

TOKENS = 2048  # that fit into the cache of an opened folder


class LlamaRuntime:
    """See `qlib.tools.runtime.Runtime`; one sequence at a time.

    Args:
        file: may be deleted afterwards; it stays mapped. tokens: of the longest sequence. exact: see `Session`.
    """

    def __init__(self, file: str | Path, tokens: int = 1024, threads: int = 1, exact: bool = False) -> None:
        self.session, self.cached = Session(file, tokens, threads, exact), 0

    def __call__(self, ids: torch.Tensor, keep: int) -> torch.Tensor:
        """Logits of the last `keep` positions of `ids [rows, tokens]`: fp32 `[rows, keep, vocabulary]`."""
        out = torch.empty(len(ids), keep, self.session.vocab)
        for row, logits in zip(ids, out):
            self._forget()
            self._run(row, keep)
            found = llama_cpp.llama_get_logits(self.session.context)
            logits.copy_(torch.from_numpy(np.ctypeslib.as_array(found, (keep, self.session.vocab))))
        self._forget()
        return out

    def prefill(self, ids: torch.Tensor) -> None:
        self._forget()
        self._run(ids)

    def decode(self, ids: torch.Tensor) -> None:
        self._run(ids)

    def close(self) -> None:
        self.session.close()

    def _forget(self) -> None:
        self.session.forget()
        self.cached = 0

    def _run(self, ids: torch.Tensor, keep: int = 1) -> None:
        count = self.cached + len(ids)
        if count > self.session.tokens:
            raise UserError(f"ids: {count} tokens in a row; allowed: at most {self.session.tokens}")
        self.session.run(ids.numpy(), self.cached, keep)
        self.cached = count


def open_exact(folder: Path) -> LlamaRuntime:
    """The model of a folder with weights, activations and attention in fp32."""
    with tempfile.TemporaryDirectory() as place:
        export(_subject(folder), file := Path(place) / "exact.gguf", dense="f32")
        return LlamaRuntime(file, TOKENS, torch.get_num_threads(), exact=True)


def open_random(folder: Path, kind: str, outer: str) -> LlamaRuntime:
    """A model with the configuration of a folder, random weights in one of its kinds, and its usual settings."""
    from transformers import AutoConfig

    with tempfile.TemporaryDirectory() as place:
        shape = shape_of_config(AutoConfig.from_pretrained(folder))
        write_kind(file := Path(place) / "random.gguf", shape, kind, outer)
        return LlamaRuntime(file, TOKENS, torch.get_num_threads())


def _subject(folder: Path) -> Subject:
    """The model without its tokenizer, which a runtime never needs and a folder of random weights does not have."""
    model = load_model(folder)
    return Subject(model, None, model.config, Source(str(folder), Path(folder), None))
