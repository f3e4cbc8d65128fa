"""Run a bf16 model in fp32 for a while: quality is computed in one dtype for all rows."""

from contextlib import contextmanager
from typing import Iterator

import torch
from torch import nn

from qlib.layers import packed_layers

__all__ = ["in_float32"]


@contextmanager
def in_float32(model: nn.Module) -> Iterator[nn.Module]:
    """Cast every bf16 parameter outside packed layers to fp32, and back afterwards (exact, since it was bf16).

    Packed layers see fp32 activations then and take their exact path: dequantize, multiply, no rounding in between.
    """
    packed = tuple(f"{name}." for name in packed_layers(model))
    cast = [p for name, p in model.named_parameters() if p.dtype == torch.bfloat16 and not name.startswith(packed or " ")]
    for parameter in cast:
        parameter.data = parameter.data.float()
    try:
        yield model
    finally:
        for parameter in cast:
            parameter.data = parameter.data.bfloat16()
