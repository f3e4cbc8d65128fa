"""Masks: which weights stay. Chosen by a score, handed from pass to pass, and read off the zeros of a pruned linear."""

from dataclasses import dataclass

import torch
from torch import nn

__all__ = ["PrunedWeight", "mark_pruned", "put_pruned", "mask_of"]

#: Marks a linear whose zeros are a mask. An attribute and not a buffer: the zeros hold the mask, a copy would take memory.
MARK = "zeros_are_pruned"


@dataclass(frozen=True)
class PrunedWeight:
    """A linear layer's float weight with some of it removed.

    Attributes:
        weight: `[out, in]`; what `mask` excludes is ignored.
        mask: bool `[out, in]`, true where a weight stays.
    """

    weight: torch.Tensor
    mask: torch.Tensor

    def dequantize(self) -> torch.Tensor:
        """The fp32 weight `[out, in]` with zeros where the mask is false."""
        return torch.where(self.mask, self.weight.float(), 0.0)


def mark_pruned(linear: nn.Module) -> None:
    """Say that the zeros of a linear, packed or not, are a mask."""
    setattr(linear, MARK, True)


@torch.no_grad()
def put_pruned(linear: nn.Linear, pruned: PrunedWeight) -> None:
    """Write a pruned weight into `linear` in place and mark its zeros as a mask."""
    linear.weight.copy_(pruned.dequantize())
    mark_pruned(linear)


def mask_of(linear: nn.Module) -> torch.Tensor | None:
    """The mask `[out, in]` of a pruned linear, packed or not; None for one that was not pruned."""
    if not getattr(linear, MARK, False):
        return None
    weight = linear.compressed().dequantize() if hasattr(linear, "compressed") else linear.weight.detach()
    return weight != 0
