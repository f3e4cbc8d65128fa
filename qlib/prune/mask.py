"""Masks: which weights stay. Chosen by a score, handed from pass to pass, and read off the zeros of a pruned linear."""

from dataclasses import dataclass

import torch
from torch import nn

from qlib.errors import UserError

__all__ = ["PrunedWeight", "mark_pruned", "is_pruned", "put_pruned", "mask_of"]

#: Marks a linear whose zeros are a mask. An attribute and not a buffer: the zeros hold the mask, a copy would take memory.
MARK = "zeros_are_pruned"


def misfit(mask: torch.Tensor, weight: torch.Tensor) -> str:
    """What is wrong with a mask of another shape than the weight or scores it is for."""
    return f"mask: its shape {list(mask.shape)} does not fit the weight's {list(weight.shape)}"


@dataclass(frozen=True)
class PrunedWeight:
    """A linear layer's float weight with some of it removed.

    Attributes:
        weight: `[out, in]`; what `mask` excludes is ignored.
        mask: bool `[out, in]`, true where a weight stays.

    Raises:
        UserError: the mask has another shape than the weight.
    """

    weight: torch.Tensor
    mask: torch.Tensor

    def __post_init__(self) -> None:
        if self.mask.shape != self.weight.shape:
            raise UserError(misfit(self.mask, self.weight))

    def rows(self, part: slice) -> "PrunedWeight":
        """Some output channels."""
        return PrunedWeight(self.weight[part], self.mask[part])

    def dequantize(self) -> torch.Tensor:
        """The fp32 weight `[out, in]` with zeros where the mask is false."""
        return torch.where(self.mask, self.weight, 0.0).float()


def mark_pruned(linear: nn.Module) -> None:
    """Say that the zeros of a linear, packed or not, are a mask."""
    setattr(linear, MARK, True)


def is_pruned(linear: nn.Module) -> bool:
    """Whether the zeros of a linear, packed or not, are a mask."""
    return getattr(linear, MARK, False)


@torch.no_grad()
def put_pruned(linear: nn.Linear, pruned: PrunedWeight) -> None:
    """Write a pruned weight into `linear` in place and mark its zeros as a mask.

    Raises:
        UserError: the mask has another shape than the linear's weight.
    """
    if pruned.mask.shape != linear.weight.shape:
        raise UserError(misfit(pruned.mask, linear.weight))
    linear.weight.copy_(pruned.weight).masked_fill_(~pruned.mask, 0)
    mark_pruned(linear)


def mask_of(linear: nn.Module) -> torch.Tensor | None:
    """The mask `[out, in]` of a pruned linear, packed or not; None for one that was not pruned."""
    if not is_pruned(linear):
        return None
    weight = linear.compressed().dequantize() if hasattr(linear, "compressed") else linear.weight.detach()
    return weight != 0
