"""Which token ids reached a tool: hashed where they enter its model, not where they were handed over."""

import hashlib

import torch
from torch import nn

__all__ = ["Witness", "hash_rows"]


def hash_rows(ids: torch.Tensor) -> str:
    """SHA-256 over the distinct rows of `ids [rows, length]`, whatever their order."""
    return _hash({bytes(row) for row in ids.to(torch.int64).cpu().contiguous().numpy()})


def _hash(rows: set[bytes]) -> str:
    return hashlib.sha256(b"".join(sorted(rows))).hexdigest()


class Witness:
    """Listens to the embedding of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.rows: set[bytes] = set()
        self.hook = model.get_input_embeddings().register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, _: nn.Module, arguments: tuple, named: dict) -> None:
        ids = arguments[0] if arguments else named["input"]
        self.rows |= {bytes(row) for row in ids.reshape(-1, ids.shape[-1]).to(torch.int64).cpu().contiguous().numpy()}

    def close(self) -> str | None:
        """Stop listening. Returns the hash of what was seen, as `hash_rows` has it; None if nothing was."""
        self.hook.remove()
        return _hash(self.rows) if self.rows else None
