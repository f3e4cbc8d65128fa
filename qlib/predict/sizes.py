"""Bytes on disk, in memory and of the key-value cache, to the byte, from the names and shapes of tensors alone."""

import json
import math

import torch

from qlib.evaluate.footprint import BF16
from qlib.layers import resident_bytes
from qlib.layers.base import ADAPTER
from qlib.layers.kv_cache import token_bytes
from qlib.layers.packing import layer_class
from qlib.layers.sparse_storage import pays
from qlib.layers.storage import expected_tensors, packed_width
from qlib.models.families import family_of
from qlib.predict.outcome import Held, Outcome
from qlib.quantize.ends import GRID
from qlib.stream.files import TYPES, Layout

__all__ = ["checkpoint_layout", "file_bytes", "disk_bytes", "model_bytes", "held_bytes", "cache_bytes_per_token"]

#: What `huggingface_hub` puts into one file at most, as `qlib.save` calls it.
SHARD = 5 * 10**9
METADATA = {"format": "pt"}
#: How safetensors sorts the tensors of a file: by type, in this order, then by name.
ORDER = ("F32", "BF16", "F8_E8M0", "F8_E4M3", "U8")


def checkpoint_layout(outcome: Outcome) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Type and shape of every tensor of the packed format; what is not packed comes first, as `qlib.save` hands it over."""
    anatomy, family = outcome.anatomy, family_of(outcome.anatomy.config)
    plain, packed = {}, {}
    coded = {f"{name}.weight" for name in _coded_ends(outcome)}
    for name, shape in anatomy.outer.items():
        if name in coded:
            packed |= {f"{name.removesuffix('weight')}{key}": one for key, one in expected_tensors(GRID, shape).items()}
        else:
            plain[name] = (torch.bfloat16, shape)
    for index, block in enumerate(outcome.held):
        for name, shape in anatomy.block.items():
            path, linear = f"{family.blocks}.{index}.{name}", name.removesuffix(".weight")
            tensors = _linear_layout(block[linear], shape) if linear in block else {}
            if tensors:
                packed |= {f"{path.removesuffix('weight')}{key}": one for key, one in tensors.items()}
            else:
                plain[path] = (torch.bfloat16, shape)
    return plain | packed


def _coded_ends(outcome: Outcome) -> list[str]:
    """Embedding and head, as far as they are in 8 bits; codes that both share are the embedding's."""
    family = family_of(outcome.anatomy.config)
    names = {"embedding": family.embedding, "head": family.head}
    return [names[end] for end in sorted(outcome.ends) if f"{names[end]}.weight" in outcome.anatomy.outer]


def _linear_layout(held: Held, shape: tuple[int, int]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """What is stored in place of a weight `[out, in]`; nothing where it is stored as it is."""
    tensors = expected_tensors(held.grid, shape) if held.grid else {}
    if held.stayed is not None and pays(held.grid, shape, held.stayed):
        tensors["mask"] = (torch.uint8, (shape[0], packed_width(shape[1], 1)))
        if held.grid:
            tensors["codes"] = (torch.uint8, (packed_width(held.stayed, held.grid.bits),))
        else:
            tensors["values"] = (torch.bfloat16, (held.stayed,))
    if held.rank:
        sizes = ((held.rank, shape[1]), (shape[0], held.rank))
        tensors |= {name: (torch.bfloat16, size) for name, size in zip(ADAPTER, sizes)}
    return tensors


def file_bytes(layout: Layout) -> int:
    """Size of a safetensors file: eight bytes, a header that is filled up to a multiple of them, and the tensors."""
    header, size = {"__metadata__": METADATA}, 0
    for name in sorted(layout, key=lambda name: (ORDER.index(TYPES[layout[name][0]]), name)):
        dtype, shape = layout[name]
        begin, size = size, size + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": TYPES[dtype], "shape": list(shape), "data_offsets": [begin, size]}
    text = len(json.dumps(header, separators=(",", ":")))
    return 8 + text + -text % 8 + size


def disk_bytes(outcome: Outcome) -> int:
    """Bytes of the weight files that `qlib.save` would write."""
    from huggingface_hub import split_state_dict_into_shards_factory

    layout = checkpoint_layout(outcome)
    files = split_state_dict_into_shards_factory(
        layout, get_storage_size=lambda one: one[0].itemsize * math.prod(one[1]), get_storage_id=lambda one: None,
        filename_pattern="model{suffix}.safetensors", max_shard_size=SHARD,
    ).filename_to_tensors  # fmt: skip
    return sum(file_bytes({name: layout[name] for name in names}) for names in files.values())


def held_bytes(held: Held, shape: tuple[int, int], device: str = "cpu") -> int:
    """Bytes that a linear `[out, in]` takes in memory of a device, without its bias."""
    size = resident_bytes(held.grid, *shape, device) if held.grid else BF16 * math.prod(shape)
    return size + BF16 * held.rank * sum(shape)


def model_bytes(outcome: Outcome, device: str = "cpu") -> int:
    """Bytes of parameters and buffers in memory of a device."""
    anatomy, coded = outcome.anatomy, {f"{name}.weight" for name in _coded_ends(outcome)}
    size = anatomy.buffers
    for name, shape in anatomy.outer.items():
        size += layer_class(GRID, *shape).expected_bytes(GRID, *shape) if name in coded else BF16 * math.prod(shape)
    for block in outcome.held:
        for name, shape in anatomy.block.items():
            held = block.get(name.removesuffix(".weight"), Held())
            size += held_bytes(held, shape, device) if len(shape) == 2 else BF16 * math.prod(shape)
    return size


def cache_bytes_per_token(outcome: Outcome) -> int:
    """Bytes of keys and values of a token, all blocks together."""
    anatomy = outcome.anatomy
    width = anatomy.head_dim
    one = BF16 * width if outcome.cache is None else token_bytes(width, *outcome.cache)
    return anatomy.layers * 2 * anatomy.kv_heads * one
