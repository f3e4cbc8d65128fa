"""Number formats as one table, without torch: what a compressed weight can hold, and what that costs in bits."""

from dataclasses import dataclass
from typing import Literal

from qlib.errors import UserError

__all__ = ["Element", "ELEMENTS", "Grid", "GridOptions"]


@dataclass(frozen=True)
class Element:
    """What the codes of a format stand for.

    Attributes:
        bits: width of a code; None: free.
        group_size: input channels that share a scale; 0: free.
        scale_bits: width of a scale. Scales of integers and of fp8 are bf16; of mxfp4 powers of two (e8m0); of nvfp4
            e4m3 times one fp32 factor of the whole tensor.
        largest: magnitude of the largest number of a float.
        mantissa: its bits behind the point. normal: its smallest normal number; below it lie subnormals, evenly spaced.
    """

    bits: int | None = None
    group_size: int = 0
    scale_bits: int = 16
    largest: float = 0.0
    mantissa: int = 0
    normal: float = 0.0


#: fp8 is e4m3 without infinities (Micikevicius et al. 2022, arXiv:2209.05433), both fp4 formats hold e2m1 numbers (OCP
#: Microscaling Formats 1.0, 2023; nvfp4: Alvarez et al. 2025).
ELEMENTS = {
    "int": Element(),
    "fp8": Element(8, 0, 16, 448.0, 3, 2.0**-6),
    "mxfp4": Element(4, 32, 8, 6.0, 1, 1.0),
    "nvfp4": Element(4, 16, 8, 6.0, 1, 1.0),
}


@dataclass(frozen=True)
class Grid:
    """A number format.

    Args:
        bits: width of a code, 2 to 8.
        group_size: input channels that share a scale and a zero; None: one group per output channel; "tensor": one
            scale for the whole weight.
        symmetric: zero is the middle code; otherwise it is fitted and stored per group. Floats are always symmetric.
        element: a name in `ELEMENTS`.
        activations: "int8" or "fp8": inputs are rounded, token by token, to symmetric 8 bits or to e4m3 when the layer
            runs.
        real_zero: zeros are bf16 numbers instead of codes (HQQ).
    """

    bits: int
    group_size: int | str | None = None
    symmetric: bool = False
    element: str = "int"
    activations: str | None = None
    real_zero: bool = False

    @property
    def levels(self) -> int:
        return 2**self.bits

    @property
    def has_zeros(self) -> bool:
        """Whether zeros are stored."""
        return self.element == "int" and not self.symmetric

    @property
    def name(self) -> str:
        """``int8``, ``int4-g128``, ``int8-a8`` (activations too), ``mxfp4``: what the speed records call the format."""
        base = f"int{self.bits}" if self.element == "int" else self.element
        group = f"-g{self.group_size}" if self.element == "int" and self.group_size else ""
        group = "-tensor" if self.group_size == "tensor" else group
        return base + group + ("-z16" if self.real_zero else "") + ("-a8" if self.activations else "")

    def groups(self, in_features: int) -> int:
        """Number of groups of a row.

        Raises:
            UserError: the group size does not divide `in_features`.
        """
        size = self.group_size if isinstance(self.group_size, int) else in_features
        if in_features % size:
            raise UserError(f"group_size {size} does not divide the {in_features} input channels of a linear")
        return in_features // size

    def bits_per_weight(self, in_features: int, out_features: int = 1) -> float:
        """Bits a weight really takes: its code, and its share of a scale and, if asymmetric, of a zero."""
        zero = (16 if self.real_zero else self.bits) if self.has_zeros else 0
        overhead = (ELEMENTS[self.element].scale_bits + zero) * self.groups(in_features) / in_features
        return self.bits + (overhead / out_features if self.group_size == "tensor" else overhead)


@dataclass(frozen=True)
class GridOptions:
    """What all passes that put weights on a grid have in common.

    Args:
        bits: width of a code.
        group_size: input channels that share a scale; null: one scale per output channel; "tensor": one in all (fp8).
        symmetric: keep the middle code for zero instead of fitting a zero per group.
        element: int, or a float format. fp8 takes bits 8 and group_size null or tensor; mxfp4 and nvfp4 have groups of
            their own, 32 and 16, whatever group_size says.
        clip: how the range of a group is chosen: none takes all of it; mse the cut that leaves the least squared error;
            activations weighs the error by the mean square of each input channel.
        activations: int8 rounds the inputs as well, token by token, when the layer runs (W8A8); fp8 rounds them to e4m3.
    """

    bits: Literal[2, 3, 4, 5, 6, 8] = 4
    group_size: Literal[32, 64, 128, "tensor"] | None = 128
    symmetric: bool = False
    element: Literal["int", "fp8", "mxfp4", "nvfp4"] = "int"
    clip: Literal["none", "mse", "activations"] = "none"
    activations: Literal["int8", "fp8"] | None = None

    def __post_init__(self) -> None:
        element = ELEMENTS[self.element]
        if element.bits and self.bits != element.bits:
            raise UserError(f"bits: {self.bits} is not allowed with element {self.element}; allowed: {element.bits}")
        if self.element == "fp8" and self.group_size not in (None, "tensor"):
            raise UserError(f"group_size: {self.group_size} is not allowed with fp8; allowed: null, tensor")
        if self.group_size == "tensor" and self.element != "fp8":
            raise UserError("group_size: tensor is allowed with element fp8 only; allowed: 32, 64, 128, null")
        if self.activations == "fp8" and self.element != "fp8":
            raise UserError(f"activations: fp8 is not allowed with element {self.element}; allowed with element fp8 only")
        whole = (self.bits, self.group_size, self.symmetric, self.element) == (8, None, True, "int")
        if self.activations == "int8" and not whole:
            raise UserError(
                "activations: int8 is allowed only with bits 8, group_size null, symmetric true and element int"
            )

    @property
    def grid(self) -> Grid:
        element = ELEMENTS[self.element]
        size = element.group_size or self.group_size
        return Grid(self.bits, size, self.symmetric or self.element != "int", self.element, self.activations)
