"""Linears in the GPTQ layout (qweight, qzeros, scales), filled without quantizing: any codes take as long."""

import math

import torch
from torch import nn

__all__ = ["block_linears", "fill", "replace"]

WORD = 2**31


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linears that tools compress: those of the blocks, not the head."""
    base = model.base_model_prefix
    found = getattr(model, base).layers.named_modules(prefix=f"{base}.layers")
    return {name: module for name, module in found if isinstance(module, nn.Linear)}


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of another, in place; what was there is free to go."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


@torch.no_grad()
def fill(layer: nn.Module, bits: int) -> None:
    """Random codes and zeros, in place, under scales that leave outputs about as large as inputs, and no bias."""
    generator = torch.Generator().manual_seed(0)
    for packed in (layer.qweight, layer.qzeros):
        packed.random_(-WORD, WORD, generator=generator)
    columns = getattr(layer, "in_features", None) or layer.infeatures
    layer.scales.fill_(math.sqrt(6 / columns) / 2**bits)  # two codes differ by 2**bits / sqrt(6) on the average
