"""The order in which our int8 kernels read codes: four output channels as one stream.

A processor reads one long stream of memory faster than several side by side, and what is loaded of the activations
serves four channels. Tiles are `[out / 4, in / 64, 4, 64]`: 64 codes of a channel, then 64 of the next one.
"""

import torch

__all__ = ["CHANNELS", "WIDTH", "tile", "untile", "rows"]

CHANNELS, WIDTH = 4, 64


def tile(codes: torch.Tensor) -> torch.Tensor:
    """Codes `[out, in]`, multiples of 4 and 64, as tiles."""
    out, width = codes.shape
    return codes.view(out // CHANNELS, CHANNELS, width // WIDTH, WIDTH).transpose(1, 2).contiguous()


def untile(codes: torch.Tensor) -> torch.Tensor:
    """Codes `[out, in]` from tiles; from `[out, in]` themselves, too."""
    if codes.dim() == 2:
        return codes
    return codes.transpose(1, 2).reshape(len(codes) * CHANNELS, -1)


def rows(codes: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The rows `index [...]` of codes, tiles or not: `[..., in]`."""
    if codes.dim() == 2:
        return codes[index]
    return codes[index // CHANNELS, :, index % CHANNELS].flatten(-2)
