"""Which packed layer a compressed weight goes into."""

from torch import nn

from qlib.errors import UserError
from qlib.layers.base import PackedLinear
from qlib.layers.codes import CodesLinear
from qlib.layers.fp8 import Fp8DynamicLinear
from qlib.layers.int2 import Int2Linear
from qlib.layers.int4 import Int4Linear
from qlib.layers.int8 import Int8DynamicLinear, Int8Linear
from qlib.quantize.grid import CompressedWeight, Grid

__all__ = ["pack", "packed_layers", "layer_class", "resident_bytes"]


def layer_class(grid: Grid, out_features: int, in_features: int, device: str = "cpu") -> type[PackedLinear]:
    """The layer for weights of this grid and shape, in use on a CPU or elsewhere.

    A kernel where there is one: W8A8; fp8 with fp8 activations; integers of 5 to 8 bits as bytes; of 3 and 4 bits as int4, with
    output channels in multiples of 16 and groups in multiples of 32; of 2 bits as int2, where this processor has our kernel and
    output channels come in multiples of 64, else as int4. All others keep their codes at their true size and are dequantized
    for every call.
    """
    if Int8DynamicLinear.fits(grid, in_features):
        return Int8DynamicLinear
    if Int8Linear.fits(grid, in_features):
        return Int8Linear
    if Fp8DynamicLinear.fits(grid):
        return Fp8DynamicLinear
    if device == "cpu" and Int2Linear.fits(grid, out_features, in_features):
        return Int2Linear
    return Int4Linear if Int4Linear.fits(grid, out_features, in_features) else CodesLinear


def pack(linear: nn.Linear, compressed: CompressedWeight) -> PackedLinear:
    """A packed layer that takes the place of `linear`: its bias, and the codes of `compressed` instead of its weight.

    Raises:
        UserError: the shapes differ.
    """
    shape = (linear.out_features, linear.in_features)
    if tuple(compressed.codes.shape) != shape:
        raise UserError(f"a compressed weight {list(compressed.codes.shape)} does not fit a linear {list(shape)}")
    return layer_class(compressed.grid, *shape)(compressed, linear.bias)


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    """The packed layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def resident_bytes(grid: Grid, out_features: int, in_features: int, device: str = "cpu") -> int:
    """Bytes a packed layer of this grid and shape keeps in memory, without its bias."""
    return layer_class(grid, out_features, in_features, device).expected_bytes(grid, out_features, in_features)
