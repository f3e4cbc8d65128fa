"""Decoder blocks of packed linears that run as one call of our own kernels, for one token."""

import ctypes
from dataclasses import dataclass

import torch

from qlib.layers.build import call

__all__ = ["RowKernel", "Blocks"]


@dataclass(frozen=True)
class RowKernel:
    """What multiplies one row with a packed linear `[out, in]`: the kernel (see `KINDS`), its group, codes, scales, offsets."""

    kind: str
    shape: tuple[int, int]
    group: int
    codes: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor | None = None


class _Linear(ctypes.Structure):
    _fields_ = [(name, ctypes.c_long) for name in ("kind", "in_", "channels", "group")]
    _fields_ += [(name, ctypes.c_void_p) for name in ("codes", "scales", "bias", "offsets")]


class _Block(ctypes.Structure):
    _fields_ = [(name, _Linear) for name in ("q", "k", "v", "o", "gate", "up", "down")]
    _fields_ += [(name, ctypes.c_void_p) for name in ("first_norm", "second_norm", "keys", "values")]
    _fields_ += [(name, ctypes.c_long) for name in ("heads", "kv_heads", "dim", "capacity")]
    _fields_ += [("epsilon", ctypes.c_float)]


#: The numbers that decode.c knows the kernels of one row by.
KINDS = {"int4_row": 0, "int8_rows": 1, "int8_dot": 2, "int2_rows": 3}


class Blocks:
    """Decoder blocks that run as one call for one token; their weights are taken as they are now.

    Args:
        blocks: of each the linears q, k, v, o, gate, up and down (kernel, bias), its two norms (the same epsilon), and
            the cache, keys and values bf16 `[kv_heads, capacity, dim]`. Widths and dim are multiples of 16.
    """

    def __init__(
        self,
        blocks: list[tuple[list[tuple[RowKernel, torch.Tensor | None]], list[torch.Tensor], list[torch.Tensor]]],
        epsilon: float,
    ) -> None:
        self.held = blocks  # the addresses below are theirs
        self.structures = (_Block * len(blocks))()
        for structure, (linears, norms, (keys, values)) in zip(self.structures, blocks):
            for (name, _), (kernel, bias) in zip(_Block._fields_, linears):
                channels, width = kernel.shape
                tensors = (kernel.codes, kernel.scales, bias, kernel.offsets)
                addresses = (None if one is None else one.data_ptr() for one in tensors)
                setattr(structure, name, _Linear(KINDS[kernel.kind], width, channels, kernel.group, *addresses))
            structure.first_norm, structure.second_norm = (norm.data_ptr() for norm in norms)
            structure.keys, structure.values = keys.data_ptr(), values.data_ptr()
            structure.kv_heads, structure.capacity, structure.dim = keys.shape
            structure.heads, structure.epsilon = structure.o.in_ // structure.dim, epsilon

    def __call__(self, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], used: int) -> torch.Tensor:
        """bf16 `x [1, hidden]` behind all blocks. `rotary`, `used`: see `native_attention.attend`."""
        x = x.clone()
        call("decode", ctypes.addressof(self.structures), x, *rotary, len(self.structures), used)
        return x
