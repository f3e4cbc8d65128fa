"""2 of every 4 weights on the sparse tensor cores of a GPU, through torch's own product; half of the bytes are read."""

import torch
import torch.nn.functional as F
from torch import nn

from qlib.errors import UserError

__all__ = ["SemiStructuredLinear"]


class SemiStructuredLinear(nn.Module):
    """A bf16 linear whose weight keeps at most 2 of every 4 consecutive inputs (2:4, Mishra et al. 2021, arXiv:2104.08378).

    Attributes:
        weight: torch's semi-structured tensor of `[out, in]`: the values that stayed, and two bits for each of their places.

    Raises:
        UserError: the weight has another pattern, or lies on a device that has no such product.
    """

    name = "bf16 2:4, torch's semi-structured product"

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        out_features, in_features = weight.shape
        if in_features % 4 or ((weight.view(out_features, -1, 4) != 0).sum(-1) > 2).any():
            raise UserError(f"a weight {[out_features, in_features]} does not keep 2 of every 4 inputs; prune it with pattern 2:4")
        if weight.device.type != "cuda":
            raise UserError(f"2:4: there is no sparse product on device '{weight.device.type}'; allowed: cuda")
        self.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(weight), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x [..., in]` -> `[..., out]` in bf16."""
        return F.linear(x, self.weight, self.bias)
