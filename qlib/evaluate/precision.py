"""Run a bf16 model in fp32 for a while: quality is computed in one dtype for all rows."""

from contextlib import contextmanager
from typing import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from qlib.layers import PackedLinear, packed_layers
from qlib.layers.base import round_tokens
from qlib.layers.embedding import PackedEmbedding

__all__ = ["in_float32", "product", "HELD_BYTES"]

#: What the fp32 weights of packed layers may take while they are held. Layers beyond it dequantize for every batch.
HELD_BYTES = 256 * 2**20
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@contextmanager
def in_float32(model: nn.Module) -> Iterator[nn.Module]:
    """Cast every bf16 parameter outside packed layers to fp32, and back afterwards (exact, since it was bf16).

    Packed layers compute what they do with fp32 activations anyway, no rounding in between; only their dequantized
    weights are kept for as long as this lasts, up to `HELD_BYTES` together.
    """
    packed = packed_layers(model)
    inside = tuple(f"{name}." for name in packed)
    outside = (p for name, p in model.named_parameters() if not name.startswith(inside or " "))
    cast = [parameter for parameter in outside if parameter.dtype == torch.bfloat16]
    for parameter in cast:
        parameter.data = parameter.data.float()
    replaced = {module: _plain(module) for module in model.modules() if type(module) is nn.Linear}
    replaced |= _packed(packed.values())
    replaced |= {module: module.rows for module in model.modules() if isinstance(module, PackedEmbedding)}
    for module, forward in replaced.items():
        module.forward = forward
    try:
        yield model
    finally:
        for module in replaced:
            del module.forward  # what its class defines comes to light again
        for parameter in cast:
            parameter.data = parameter.data.bfloat16()


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear`; in fp32 on a CPU through oneDNN, twice as fast as what torch takes (MKL) on processors of AMD."""
    suits = ONEDNN and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    if not suits or (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)):
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")


def _plain(linear: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: product(x, linear.weight, linear.bias)


def _packed(layers) -> dict[nn.Module, Callable[[torch.Tensor], torch.Tensor]]:
    """Forwards for the packed layers that keep the exact path as it is, with held weights while there is room."""
    forwards, room = {}, HELD_BYTES
    for layer in layers:
        if type(layer).forward is not PackedLinear.forward:
            continue
        size = 4 * layer.in_features * layer.out_features
        held = layer.effective_weight() if size <= room else None
        room -= size if held is not None else 0
        forwards[layer] = _dequantized(layer, held)
    return forwards


def _dequantized(layer: PackedLinear, held: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        if layer.grid.activations:
            codes, scales = round_tokens(x, layer.grid.activations)
            x = (codes * scales).to(x.dtype)
        weight = layer.effective_weight() if held is None else held
        return product(x, weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))

    return forward
