"""SmoothQuant (Xiao et al. 2022, arXiv:2211.10438): hand outliers of the activations over to the weights.

Activations that are rounded token by token suffer from channels that are always large: the other channels of the token
are left few steps. Equation 4: s_j = max|X_j|^alpha / max|W_j|^(1 - alpha) divides input channel j and multiplies its
weights, so that with alpha = 1/2 both have the same largest magnitude.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from qlib.errors import UserError
from qlib.recipe import BlockContext
from qlib.transforms.rescale import PRODUCERS, by_channel, rescale
from qlib.walk import feed_groups

__all__ = ["Options", "SCOPE", "PREPARES", "CALIBRATES", "check", "apply"]

SCOPE = "block"
PREPARES = True
CALIBRATES = True


@dataclass(frozen=True)
class Options:
    """Options of a SmoothQuant pass.

    Args:
        alpha: how much of the difficulty moves from the activations to the weights, 0 to 1.
        inner: smooth the inputs of o_proj and down_proj too, by the rows of v_proj and up_proj.
    """

    alpha: float = field(default=0.5, metadata={"minimum": 0})
    inner: bool = False


class _Largest:
    """Largest magnitude of each input channel `[in]`."""

    def __init__(self, width: int):
        self.values = torch.zeros(width)

    def feed(self, inputs: torch.Tensor) -> None:
        self.values = torch.maximum(self.values.to(inputs.device), inputs.float().abs().amax(0))


def check(subject: Any, options: Options) -> None:
    """Refuse an alpha that is no share."""
    if not 0 <= options.alpha <= 1:
        raise UserError(f"alpha: {options.alpha} is not allowed; allowed: 0 to 1")


@torch.no_grad()
def apply(block: nn.Module, options: Options, context: BlockContext) -> None:
    """Smooth the inputs of the linears behind a norm, or of all linears of a block; in place."""
    seen = {
        names: _Largest(block.get_submodule(names[0]).in_features)
        for names in context.groups
        if options.inner or block.get_submodule(PRODUCERS[names[0]]).weight.dim() == 1
    }
    feed_groups(block, context.inputs, {names: largest.feed for names, largest in seen.items()})
    for names, largest in seen.items():
        weight = torch.cat([block.get_submodule(name).weight for name in names]).float().abs().amax(0)
        inputs, weights = (by_channel(block, names, values).amax(1) for values in (largest.values, weight))
        scale = inputs**options.alpha / weights ** (1 - options.alpha)
        rescale(block, names, torch.where((inputs > 0) & (weights > 0), scale, 1.0))
