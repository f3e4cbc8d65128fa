"""Sizes: of a real model, by looking at its tensors; of a true shape in any format, by arithmetic.

A format is a grid, and behind an @ what width pruning keeps: ``bf16``, ``int4-g128``, ``bf16@0.653`` (that share of heads
and FFN channels), ``int8@0.75/0.5`` (heads, FFN). A mix gives each linear of a layer shares of formats.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict

from torch import nn

from qlib.errors import UserError
from qlib.layers import packed_layers, resident_bytes
from qlib.layers.storage import stored_bytes
from qlib.models.families import blocks_of, linears_of
from qlib.models.shapes import Shape
from qlib.quantize.formats import ELEMENTS, Grid
from qlib.record import Measurement

__all__ = [
    "measure_footprint", "shape_footprint", "disk_bytes", "kv_cache_bytes", "grid_of", "narrowed_shape", "linear_formats", "some_format",
    "Format",
]  # fmt: skip

#: The name of a format, or for each linear of a layer the share of layers that have it in each format.
Format = str | Mapping[str, Mapping[str, float]]

BF16 = 2  # bytes
FORMAT = re.compile(
    r"(?:bf16|int([234568])(?:-g([1-9]\d*))?(-z16)?(-a8)?|(fp8|fp8-tensor|mxfp4|nvfp4))(?:@([\d.]+)(?:/([\d.]+))?)?"
)


def _match(format: str) -> re.Match:
    match = FORMAT.fullmatch(format)
    if match is None:
        known = (
            "bf16, int8, int4-g128 and the like (bits 2, 3, 4, 5, 6, 8), int8-a8, fp8, fp8-tensor, mxfp4, nvfp4, "
            "and with what pruning keeps bf16@0.653"
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
        name, _, tensor = element.partition("-")
        one = ELEMENTS[name]
        return Grid(one.bits, one.group_size or tensor or None, True, name)
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
    linears of the blocks, scales and zeros included; ``_total`` is over all weights. Zeros in a dense weight count in full.
    """
    packed = packed_layers(model)
    codes = sum(stored_bytes(layer.grid, layer.out_features, layer.in_features) for layer in packed.values())
    compressed = sum(layer.out_features * layer.in_features for layer in packed.values())
    dense = [one for block in blocks_of(model) for one in linears_of(model, block).values() if hasattr(one, "weight")]
    parameters = {id(parameter): parameter for parameter in model.parameters()}.values()
    others = sum(parameter.numel() for parameter in parameters)
    rest = _storage_bytes(parameters)
    storages = _storage_bytes([*model.parameters(), *model.buffers()])
    linears = compressed + sum(one.weight.numel() for one in dense)
    stored = codes + sum(one.weight.numel() * one.weight.element_size() for one in dense)
    return {
        "size.resident_bytes": _bytes(storages, "parameters and buffers, shared ones once", "no activations, no cache"),
        "size.bits_per_weight_total": _bits(codes + rest, compressed + others, "all weights"),
        "size.bits_per_weight": _bits(stored, linears, "linears of the blocks"),
    }


def _storage_bytes(tensors) -> int:
    """Memory behind tensors: whole storages, so that nothing hides behind a view."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def shape_footprint(shape: Shape, format: Format) -> dict[str, dict]:
    """The ``size.*`` measurements of a model of this shape in a format, by arithmetic.

    The linears of the layers are in the format; embedding, head, norms and biases stay in bf16.
    """
    disk = resident = weights = 0.0
    for name, shares in linear_formats(shape, format).items():
        for one, share in shares.items():
            grid, size = grid_of(one), narrowed_shape(shape, one).linears[name]
            count = share * shape.layers * size[0] * size[1]
            weights += count
            disk += share * shape.layers * stored_bytes(grid, *size) if grid else BF16 * count
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


def _bytes(value: int, method: str, conditions: str) -> dict:
    return asdict(Measurement(value, "bytes", method=method, conditions=conditions))


def _bits(size: float, weights: int, over: str) -> dict:
    """`size` bytes as bits for each of `weights`."""
    method = "codes, scales and zeros at their stored size"
    return asdict(Measurement(8 * size / weights, "bits", method=method, conditions=f"over {over}"))
