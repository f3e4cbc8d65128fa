"""Packed layers: linear layers that hold codes, and choose a kernel by the number of rows."""

from qlib.layers.base import PackedLinear
from qlib.layers.packing import layer_class, pack, packed_layers, resident_bytes

__all__ = ["PackedLinear", "layer_class", "pack", "packed_layers", "resident_bytes"]
