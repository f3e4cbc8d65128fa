"""Keys and values as codes: a cache for transformers that holds a few bits of every number.

One scale and one zero for each token, head and group of channels, so that a token is stored as it arrives and never
touched again. Keys have channels that stand out in all tokens, and would lose less with a scale per channel (Liu et al.
2024, KIVI, arXiv:2402.02750); that needs the last tokens in full precision until a group of them is complete.
"""

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from qlib.layers.storage import pack_bits, packed_width, unpack_bits
from qlib.models.families import blocks_of

__all__ = ["CodesLayer", "make_cache", "encode", "decode", "token_bytes", "cache_bytes"]

TINY = 2.0**-120  # least scale: groups of equal numbers have none of their own


class CodesLayer(DynamicLayer):
    """The cache of one layer. `keys` and `values` are uint8 `[batch, heads, tokens, token_bytes]`.

    A row of bytes is all that there is of a token, so that what transformers does with a cache (crop, reorder, repeat)
    works on rows. New tokens are seen as they are stored, in a prompt too: what a text is worth does not depend on
    how much of it runs at once.
    """

    def __init__(self, bits: int, group_size: int | None = None) -> None:
        super().__init__()
        self.bits, self.group_size = bits, group_size

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values `[batch, heads, new tokens, head_dim]`; returns all, dequantized in their type."""
        stored = (encode(states, self.bits, self.group_size) for states in (key_states, value_states))
        super().update(*stored)
        widths = (key_states.shape[-1], value_states.shape[-1])
        return tuple(
            decode(rows, self.bits, self.group_size, width).to(key_states.dtype)
            for rows, width in zip((self.keys, self.values), widths)
        )


def make_cache(model: nn.Module) -> Cache:
    """An empty cache as the model's configuration asks for it: for ``model.generate(past_key_values=...)``."""
    settings = getattr(model.config, "kv_cache", None)
    if settings is None:
        return DynamicCache(config=model.config)
    return Cache(layers=[CodesLayer(**settings) for _ in blocks_of(model)])


def encode(states: torch.Tensor, bits: int, group_size: int | None = None) -> torch.Tensor:
    """Round numbers `[..., width]` to codes; returns rows of bytes `[..., token_bytes(width, bits, group_size)]`.

    Code c of a group means least + c * scale. Both are stored in bf16, rounded so that the codes span the whole group:
    no number moves by more than half a step.
    """
    groups = states.float().unflatten(-1, (-1, group_size or states.shape[-1]))  # [..., groups, channels]
    least = _bf16(groups.amin(-1), -torch.inf)
    scales = _bf16(((groups.amax(-1) - least.float()) / (2**bits - 1)).clamp(min=TINY), torch.inf)
    steps = (groups - least.float()[..., None]) / scales.float()[..., None]
    codes = steps.round_().clamp_(0, 2**bits - 1).to(torch.uint8).flatten(-2)  # [..., width]
    packed = pack_bits(codes.flatten(0, -2), bits).view(*codes.shape[:-1], -1)
    return torch.cat([packed, scales.view(torch.uint8), least.view(torch.uint8)], dim=-1)


def decode(rows: torch.Tensor, bits: int, group_size: int | None, width: int) -> torch.Tensor:
    """The inverse of `encode` but for rounding: fp32 numbers `[..., width]`."""
    sizes = [packed_width(width, bits), *[2 * (width // (group_size or width))] * 2]
    packed, scales, least = rows.split(sizes, dim=-1)
    codes = unpack_bits(packed.flatten(0, -2), bits, width).view(*scales.shape[:-1], scales.shape[-1] // 2, -1)
    scales, least = (_numbers(part)[..., None] for part in (scales, least))
    return torch.addcmul(least, codes.float(), scales).flatten(-2)


def token_bytes(width: int, bits: int, group_size: int | None = None) -> int:
    """Bytes that the keys, or the values, of a token take in one head."""
    return packed_width(width, bits) + 4 * (width // (group_size or width))


def cache_bytes(cache: Cache) -> int:
    """Bytes that the keys and values of a cache really take in memory, whole storages."""
    return sum(part.untyped_storage().nbytes() for layer in cache.layers for part in (layer.keys, layer.values))


def _bf16(values: torch.Tensor, towards: float) -> torch.Tensor:
    """fp32 `values` in bf16, rounded upwards (`towards` inf) or downwards (-inf)."""
    near = values.bfloat16()
    short = near.float() < values if towards > 0 else near.float() > values
    return torch.where(short, torch.nextafter(near, torch.full_like(near, towards)), near)


def _numbers(stored: torch.Tensor) -> torch.Tensor:
    """bf16 numbers from bytes `[..., 2 * count]` that may begin anywhere in a row -> fp32 `[..., count]`."""
    return stored.clone(memory_format=torch.contiguous_format).view(torch.bfloat16).float()
