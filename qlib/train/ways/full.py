"""Every weight learns, and norms, biases and embedding: packed layers through rounding, pruned weights stay zero."""

from contextlib import contextmanager
from typing import Any, Callable, Iterator

from torch import nn

from qlib.errors import UserError
from qlib.models.load import Subject
from qlib.prune.mask import mask_of
from qlib.train.fake_quant import pack_again, unpack_for_training

__all__ = ["check", "describe", "trainable"]


def check(subject: Subject, options: Any) -> None:
    """Refuse a choice of linears: all of them learn."""
    if options.targets is not None:
        raise UserError(f"targets: {options.targets} is not allowed with train: full; allowed: null, or train: lora")


def describe(options: Any) -> dict[str, Any]:
    """Nothing: there are no options of this way."""
    return {}


@contextmanager
def trainable(model: nn.Module, options: Any, seed: int) -> Iterator[Callable[[], None]]:
    """All parameters learn; afterwards packed layers are where there were packed layers.

    Yields what makes pruned weights zero again; the masks of those that were packed are kept by their stand-ins.
    """
    masks = [(linear.weight, mask_of(linear)) for linear in model.modules() if isinstance(linear, nn.Linear)]
    unpack_for_training(model)
    model.requires_grad_(True)

    def keep_zeros() -> None:
        for weight, mask in masks:
            if mask is not None:
                weight.data.mul_(mask)

    try:
        yield keep_zeros
    finally:
        pack_again(model)
