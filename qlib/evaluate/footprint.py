"""Sizes: of a real model, by looking at its tensors; of a true shape in any format, by arithmetic."""

import re
from dataclasses import asdict

from torch import nn

from qlib.errors import UserError
from qlib.layers import packed_layers, resident_bytes
from qlib.layers.storage import stored_bytes
from qlib.models.shapes import Shape
from qlib.quantize.grid import Grid
from qlib.record import Measurement

__all__ = ["measure_footprint", "shape_footprint", "disk_bytes", "kv_cache_bytes", "grid_of"]

BF16 = 2  # bytes
FORMAT = re.compile(r"int([234568])(?:-g([1-9]\d*))?")


def grid_of(format: str) -> Grid | None:
    """The grid a format's name stands for (zeros fitted, not symmetric); None for ``bf16``.

    Raises:
        UserError: no such format.
    """
    match = FORMAT.fullmatch(format)
    if match is None and format != "bf16":
        known = "bf16, int8, int4-g128 and the like (bits 2, 3, 4, 5, 6, 8)"
        raise UserError(f"format '{format}' is unknown; allowed: {known}")
    return match and Grid(int(match[1]), int(match[2]) if match[2] else None)


def measure_footprint(model: nn.Module) -> dict[str, dict]:
    """Bytes in memory and effective bits per weight of a real model, as ``size.*`` measurements.

    Memory is that of all parameters and buffers, shared storage counted once. ``size.bits_per_weight`` is over the
    packed linears, scales and zeros included, and absent where there are none; ``_total`` is over all weights.
    """
    packed = packed_layers(model)
    shapes = [(layer.grid, layer.out_features, layer.in_features) for layer in packed.values()]
    codes = sum(stored_bytes(*shape) for shape in shapes)
    compressed = sum(rows * columns for _, rows, columns in shapes)
    parameters = {id(parameter): parameter for parameter in model.parameters()}.values()
    others = sum(parameter.numel() for parameter in parameters)
    rest = _storage_bytes(parameters)
    storages = _storage_bytes([*model.parameters(), *model.buffers()])
    sizes = {
        "size.resident_bytes": _bytes(storages, "parameters and buffers, shared ones once", "no activations, no cache"),
        "size.bits_per_weight_total": _bits(codes + rest, compressed + others, "all weights"),
    }
    return sizes | ({"size.bits_per_weight": _bits(codes, compressed, "compressed linears")} if packed else {})


def _storage_bytes(tensors) -> int:
    """Memory behind tensors: whole storages, so that nothing hides behind a view."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def shape_footprint(shape: Shape, format: str) -> dict[str, dict]:
    """The ``size.*`` measurements of a model of this shape in a format, by arithmetic.

    The linears of the layers are in the format; embedding, head, norms and biases stay in bf16.
    """
    grid = grid_of(format)
    kept = BF16 * (shape.parameters - shape.layers * shape.linear_parameters)
    linears = shape.layers * shape.linear_parameters
    if grid is None:
        disk = resident = BF16 * shape.parameters
    else:
        disk = kept + shape.layers * sum(stored_bytes(grid, *size) for size in shape.linears.values())
        resident = kept + shape.layers * sum(resident_bytes(grid, *size) for size in shape.linears.values())
    where = f"{shape.name}; embedding, head, norms and biases in bf16"
    sizes = {
        "size.disk_bytes": _bytes(disk, "arithmetic from the shape: tensor data, without file headers", where),
        "size.resident_bytes": _bytes(resident, "arithmetic from the shape: packed layers as they are held", where),
        "size.bits_per_weight_total": _bits(disk, shape.parameters, "all weights"),
    }
    return sizes | ({"size.bits_per_weight": _bits(disk - kept, linears, "compressed linears")} if grid else {})


def disk_bytes(shape: Shape, format: str) -> int:
    """Bytes of a checkpoint's tensors."""
    return shape_footprint(shape, format)["size.disk_bytes"]["value"]


def kv_cache_bytes(shape: Shape, tokens: int = 1) -> int:
    """Bytes that the bf16 key-value cache of all layers takes for a context of `tokens`."""
    return BF16 * shape.layers * shape.kv_elements * tokens


def _bytes(value: int, method: str, conditions: str) -> dict:
    return asdict(Measurement(value, "bytes", method=method, conditions=conditions))


def _bits(size: int, weights: int, over: str) -> dict:
    """`size` bytes as bits for each of `weights`."""
    method = "codes, scales and zeros at their stored size"
    return asdict(Measurement(8 * size / weights, "bits", method=method, conditions=f"over {over}"))
