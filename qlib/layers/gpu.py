"""What products with packed codes on a GPU need beside torch's own operators: our Triton kernels, where Triton is."""

from functools import lru_cache
from types import ModuleType

import torch

from qlib.layers import base

__all__ = ["kernels", "missing", "round_tokens"]


@lru_cache(maxsize=None)
def _load() -> tuple[ModuleType | None, str]:
    try:
        from qlib.layers import triton_kernels
    except ImportError as error:
        return None, f"Triton is not here: {error}"
    return triton_kernels, ""


def kernels() -> ModuleType | None:
    """The module `triton_kernels`; None where it cannot be."""
    return _load()[0]


def missing() -> str:
    """Why there are no Triton kernels; empty if there are."""
    return _load()[1]


def round_tokens(x: torch.Tensor, element: str) -> tuple[torch.Tensor, torch.Tensor]:
    """`base.round_tokens` of `x [rows, in]` on a GPU, in one kernel where there is one."""
    own = kernels()
    return own.round_tokens(x, element) if own else base.round_tokens(x, element)
