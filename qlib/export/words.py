"""Codes in 32-bit words, as GPTQ and compressed-tensors files hold them: one stream of bits, the first code lowest."""

import torch
import torch.nn.functional as F

from qlib.layers.storage import pack_bits

__all__ = ["pack_words"]


def pack_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes `[rows, count]` to int32 `[rows, ceil(count * bits / 32)]`."""
    packed = pack_bits(codes.contiguous(), bits)
    return F.pad(packed, (0, -packed.shape[1] % 4)).flatten().view(torch.int32).view(len(codes), -1)
