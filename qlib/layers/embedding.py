"""An embedding in int8, and a head that shares its codes."""

import torch
from torch import nn

from qlib.layers import int8_tiles
from qlib.layers.base import hold_bits
from qlib.layers.int8 import Int8Linear
from qlib.quantize.grid import CompressedWeight

__all__ = ["PackedEmbedding", "tied_head"]


class PackedEmbedding(nn.Module):
    """int8 codes and a scale per row; a look-up dequantizes the rows it returns, in the type of the model.

    Args:
        compressed: codes `[vocab, hidden]` of symmetric int8 with one scale per row.
    """

    def __init__(self, compressed: CompressedWeight) -> None:
        super().__init__()
        self.grid = compressed.grid
        self.out_features, self.in_features = compressed.codes.shape
        self.register_buffer("codes", (compressed.codes - self.grid.levels // 2).view(torch.int8))  # [vocab, hidden], or tiles
        self.register_buffer("scale_bits", hold_bits(compressed.scales))  # bf16 [vocab, 1]
        self.register_buffer("like", torch.empty(0, dtype=torch.bfloat16), persistent=False)  # follows .float(), .to()

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """fp32 rows `[..., hidden]` of token ids `[...]`."""
        return int8_tiles.rows(self.codes, ids).float() * self.scale_bits.view(torch.bfloat16)[ids].float()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.rows(ids).to(self.like.dtype)

    def compressed(self) -> CompressedWeight:
        """The weight this embedding was made of, bit by bit."""
        scales, middle = self.scale_bits.view(torch.bfloat16).clone(), self.grid.levels // 2
        zeros = torch.full(scales.shape, middle, dtype=torch.uint8, device=scales.device)
        return CompressedWeight(self.grid, int8_tiles.untile(self.codes).view(torch.uint8) + middle, scales, zeros)

    def extra_repr(self) -> str:
        return f"{self.out_features}, {self.in_features}, {self.grid.name}"


def tied_head(embedding: PackedEmbedding) -> Int8Linear:
    """A head without bias; the embedding takes over its codes and scales: one copy in memory serves both."""
    head = Int8Linear(embedding.compressed())
    embedding.codes, embedding.scale_bits = head.codes, head.scale_bits
    return head
