"""Number formats to train in, as one table: what products, weights and updates are, and what guards small numbers."""

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Iterator, Literal, get_args

import torch

from qlib.errors import UserError
from qlib.train.bf16_adamw import Rounding

__all__ = ["Precision", "Format", "FORMATS", "INITIAL_SCALE", "check_precision", "products"]

Precision = Literal["fp32", "tf32", "bf16", "fp16", "fp16-unscaled", "bf16-pure", "bf16-kahan", "bf16-stochastic"]
INITIAL_SCALE = 2.0**16  # of fp16 losses; halved whenever a gradient is not finite


@dataclass(frozen=True)
class Format:
    """A way to train.

    Attributes:
        autocast: type of matrix products where weights are fp32; None: that of the weights.
        weights: of weights, gradients and the optimizer's state.
        products: what `torch.set_float32_matmul_precision` calls the products of fp32 matrices; None: left alone.
        scaled: whether the loss is scaled up, dynamically, for gradients that fp16 cannot hold.
        rounding: how bf16 weights take an update.
    """

    autocast: torch.dtype | None = None
    weights: torch.dtype = torch.float32
    products: str | None = None
    scaled: bool = False
    rounding: Rounding = "nearest"


#: Mixed precision keeps fp32 weights (Micikevicius et al. 2018, arXiv:1710.03740); pure bf16 has no fp32 anywhere but in
#: norms, softmax and loss.
FORMATS: dict[str, Format] = {
    "fp32": Format(products="highest"),
    "tf32": Format(products="high"),
    "bf16": Format(torch.bfloat16),
    "fp16": Format(torch.float16, scaled=True),
    "fp16-unscaled": Format(torch.float16),
    "bf16-pure": Format(weights=torch.bfloat16),
    "bf16-kahan": Format(weights=torch.bfloat16, rounding="kahan"),
    "bf16-stochastic": Format(weights=torch.bfloat16, rounding="stochastic"),
}


def check_precision(precision: str, device: str) -> None:
    """Refuse a precision that is unknown, or that the device lacks.

    Raises:
        UserError: so it is; the message says why.
    """
    if precision not in get_args(Precision):
        raise UserError(f"precision: '{precision}' is unknown; allowed: {', '.join(get_args(Precision))}")
    if precision == "tf32" and device != "cuda":
        raise UserError(
            f"precision: 'tf32' is a format of NVIDIA's tensor cores, the device is {device}; "
            f"allowed here: {', '.join(one for one in get_args(Precision) if one != 'tf32')}"
        )


@contextmanager
def products(precision: str) -> Iterator[None]:
    """How products of fp32 matrices are computed for a while; the global setting comes back."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(FORMATS[precision].products or before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
