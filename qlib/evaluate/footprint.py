"""Sizes: of a real model, by looking at its tensors; of a true shape in any format, by arithmetic.

A format is a grid, and behind an @ what width pruning keeps: ``bf16``, ``int4-g128``, ``bf16@0.653`` (that share of heads
and FFN channels), ``int8@0.75/0.5`` (heads, FFN). A mix gives each linear of a layer shares of formats.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict

import torch
from torch import nn

from qlib.errors import UserError
from qlib.layers import resident_bytes
from qlib.layers.sparse_storage import count_survivors, sparse_bytes
from qlib.layers.storage import stored_bytes
from qlib.models.families import blocks_of, linears_of
from qlib.models.packed import coded_modules
from qlib.models.shapes import Shape
from qlib.prune.mask import is_pruned
from qlib.quantize.formats import ELEMENTS, Grid
from qlib.record import Measurement

__all__ = [
    "measure_footprint", "shape_footprint", "disk_bytes", "kv_cache_bytes", "grid_of", "narrowed_shape", "linear_formats", "some_format",
    "Format",
]  # fmt: skip

#: The name of a format, or for each linear of a layer the share of layers that have it in each format.
Format = str | Mapping[str, Mapping[str, float]]

BF16 = 2  # bytes
KV_TOKENS = 16  # that a cache is filled with to see what it takes
FORMAT = re.compile(
    r"(?:bf16|int([234568])(?:-g([1-9]\d*))?(-z16)?(-a8)?|((?:fp8|fp8-tensor)(?:-a8)?|mxfp4|nvfp4))(?:@([\d.]+)(?:/([\d.]+))?)?"
)


def _match(format: str) -> re.Match:
    match = FORMAT.fullmatch(format)
    if match is None:
        known = (
            "bf16, int8, int4-g128 and the like (bits 2, 3, 4, 5, 6, 8), int8-a8, fp8, fp8-tensor, fp8-a8, mxfp4, "
            "nvfp4, and with what pruning keeps bf16@0.653"
        )
        raise UserError(f"format '{format}' is unknown; allowed: {known}")
    return match


def grid_of(format: str) -> Grid | None:
    """The grid a format's name stands for (zeros fitted, but for int8-a8 and floats); None for ``bf16``.

    Raises:
        UserError: no such format.
    """
    bits, group, real, dynamic, element, *_ = _match(format).groups()
    if element:
        name, *more = element.split("-")
        one = ELEMENTS[name]
        size = one.group_size or ("tensor" if "tensor" in more else None)
        return Grid(one.bits, size, True, name, "fp8" if "a8" in more else None)
    if bits is None:
        return None
    return Grid(int(bits), int(group) if group else None, bool(dynamic), "int", "int8" if dynamic else None, bool(real))


def narrowed_shape(shape: Shape, format: str) -> Shape:
    """The shape that is left where the format's name says what width pruning keeps; else the shape itself.

    Raises:
        UserError: no such format, or it keeps nothing.
    """
    *_, heads, ffn = _match(format).groups()
    return shape if heads is None else shape.narrowed(float(heads), float(ffn or heads))


def linear_formats(shape: Shape, format: Format) -> dict[str, Mapping[str, float]]:
    """The format as a mix: name of each linear of a layer -> format -> share of layers."""
    return {name: {format: 1.0} for name in shape.linears} if isinstance(format, str) else dict(format)


def measure_footprint(model: nn.Module) -> dict[str, dict]:
    """Bytes in memory and effective bits per weight of a real model, as ``size.*`` measurements.

    Memory is that of all parameters and buffers, shared storage counted once. ``size.bits_per_weight`` is over the
    linears of the blocks, scales and zeros included; ``_total`` is over all weights. Both as on disk, where the zeros of a
    mask are left out if that takes less (see `qlib.layers.sparse_storage`); in memory they count in full.
    """
    coded = coded_modules(model).values()
    parameters = {id(parameter): parameter for parameter in model.parameters()}.values()
    linears = [linear for block in blocks_of(model) for linear in linears_of(model, block).values()]
    masked = [linear for linear in linears if is_pruned(linear) and hasattr(linear, "weight")]
    left_out = sum(linear.weight.nbytes - _stored_bytes(linear) for linear in masked)
    stored = sum(map(_stored_bytes, coded)) + _storage_bytes(parameters) - left_out
    weights = sum(map(_weights, coded)) + sum(parameter.numel() for parameter in parameters)
    inside = sum(map(_stored_bytes, linears))
    storages = _storage_bytes([*model.parameters(), *model.buffers()])
    return {
        "size.resident_bytes": _bytes(storages, "parameters and buffers, shared ones once", "no activations, no cache"),
        "size.bits_per_weight_total": _bits(stored, weights, "all weights"),
        "size.bits_per_weight": _bits(inside, sum(map(_weights, linears)), "linears of the blocks"),
        "size.kv_bytes_per_token": _kv_bytes(model),
    }


@torch.no_grad()
def _kv_bytes(model: nn.Module) -> dict:
    """What the model's own key-value cache holds for a token, all layers together."""
    from qlib.layers.kv_cache import cache_bytes, make_cache

    cache = make_cache(model)
    ids = torch.zeros(1, KV_TOKENS, dtype=torch.long, device=model.device)
    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    method = f"memory of a cache filled with {KV_TOKENS} tokens"
    return _bytes(cache_bytes(cache) / KV_TOKENS, method, "all layers, keys and values, batch 1")


def _weights(module: nn.Module) -> int:
    return module.weight.numel() if hasattr(module, "weight") else module.out_features * module.in_features


def _stored_bytes(module: nn.Module) -> int:
    """Bytes of a weight in a checkpoint with its adapter, without bias; zeros that are a mask are not stored where that takes less."""
    if is_pruned(module):
        shape = (module.out_features, module.in_features)
        return sparse_bytes(getattr(module, "grid", None), shape, count_survivors(module))
    if hasattr(module, "weight"):
        return module.weight.numel() * module.weight.element_size()
    adapter = [getattr(module, name, None) for name in ("adapter_down", "adapter_up")]
    beside = sum(one.nbytes for one in adapter if one is not None)
    return stored_bytes(module.grid, module.out_features, module.in_features) + beside


def _storage_bytes(tensors) -> int:
    """Memory behind tensors: whole storages, so that nothing hides behind a view."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def shape_footprint(shape: Shape, format: Format, stayed: float = 1.0) -> dict[str, dict]:
    """The ``size.*`` measurements of a model of this shape in a format, by arithmetic.

    The linears of the layers are in the format; embedding, head, norms and biases stay in bf16.

    Args:
        stayed: share of the weights of the linears that is not 0; the zeros of a mask are not stored where that takes less.
    """
    disk = resident = weights = 0.0
    for name, shares in linear_formats(shape, format).items():
        for one, share in shares.items():
            grid, size = grid_of(one), narrowed_shape(shape, one).linears[name]
            count = share * shape.layers * size[0] * size[1]
            weights += count
            disk += share * shape.layers * sparse_bytes(grid, size, stayed * size[0] * size[1])
            resident += share * shape.layers * resident_bytes(grid, *size) if grid else BF16 * count
    own = narrowed_shape(shape, some_format(format))
    kept = BF16 * (own.parameters - own.layers * own.linear_parameters)
    where = f"{shape.name}; embedding, head, norms and biases in bf16"
    return {
        "size.disk_bytes": _bytes(round(disk) + kept, "arithmetic from the shape: tensor data, without file headers", where),
        "size.resident_bytes": _bytes(round(resident) + kept, "arithmetic from the shape: packed layers as they are held", where),
        "size.bits_per_weight_total": _bits(disk + kept, own.parameters, "all weights"),
        "size.bits_per_weight": _bits(disk, weights, "linears of the blocks"),
    }


def some_format(format: Format) -> str:
    """A format's name; of a mix that of any part, since all parts are pruned alike."""
    return format if isinstance(format, str) else next(iter(next(iter(format.values()))))


def disk_bytes(shape: Shape, format: str) -> int:
    """Bytes of a checkpoint's tensors."""
    return shape_footprint(shape, format)["size.disk_bytes"]["value"]


def kv_cache_bytes(shape: Shape, tokens: int = 1) -> int:
    """Bytes that the bf16 key-value cache of all layers takes for a context of `tokens`."""
    return BF16 * shape.layers * shape.kv_elements * tokens


def _bytes(value: float, method: str, conditions: str) -> dict:
    return asdict(Measurement(value, "bytes", method=method, conditions=conditions))


def _bits(size: float, weights: int, over: str) -> dict:
    """`size` bytes as bits for each of `weights`."""
    method = "codes, scales and zeros at their stored size"
    return asdict(Measurement(8 * size / weights, "bits", method=method, conditions=f"over {over}"))
