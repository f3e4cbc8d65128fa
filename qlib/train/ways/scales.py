"""Only scales and zeros of packed layers learn, the codes stay (EfficientQAT's second stage, Chen et al. 2024, arXiv:2407.11062).

A hundredth of the weights of a group of 128 learns, so it takes little memory beside the model and can hardly overfit.
"""

from contextlib import contextmanager
from typing import Any, Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from qlib.errors import UserError
from qlib.layers import PackedLinear, pack, packed_layers
from qlib.models.load import Subject
from qlib.prune.mask import mark_pruned, mask_of
from qlib.quantize.grid import CompressedWeight
from qlib.train.fake_quant import SCALE_RATE, straight_through

__all__ = ["check", "describe", "trainable", "ScaledLinear"]

ZERO_RATE = 30.0  # codes that a zero moves by at a learning rate of 1, before it is rounded


class ScaledLinear(nn.Module):
    """Stands in for a packed layer of integers: fixed codes, and scales and zeros that learn.

    Attributes:
        codes: uint8 `[out, groups, group size]`. signs: of the scales. mask: bool `[out, in]` or None: false stays zero.
        log_scales: fp32 `[out, groups]`, as in `fake_quant.FakeQuantLinear`.
        shifts: fp32 `[out, groups]`, by how much zeros have moved, divided by `ZERO_RATE`; None where the grid stores none.
    """

    def __init__(self, packed: PackedLinear) -> None:
        super().__init__()
        compressed = packed.compressed()
        self.grid, self.in_features, self.out_features = packed.grid, packed.in_features, packed.out_features
        self.register_buffer("codes", compressed.codes.view(self.out_features, compressed.scales.shape[1], -1))
        self.register_buffer("zeros", compressed.zeros)
        self.register_buffer("mask", mask_of(packed))
        self.register_buffer("signs", compressed.scales.float().sign())
        self.log_scales = nn.Parameter(compressed.scales.float().abs().log() / SCALE_RATE)
        self.shifts = nn.Parameter(torch.zeros_like(self.log_scales)) if self.grid.has_zeros else None
        self.register_parameter("bias", packed.bias)

    def scales_and_zeros(self) -> tuple[torch.Tensor, torch.Tensor]:
        """fp32 `[out, groups]` each, rounded as they will be stored."""
        exact = self.signs * (self.log_scales * SCALE_RATE).exp()
        scales, zeros = straight_through(exact, exact.bfloat16().float()), self.zeros.float()
        if self.shifts is None:
            return scales, zeros
        moved = zeros + self.shifts * ZERO_RATE
        return scales, straight_through(moved, moved.round().clamp(0, self.grid.levels - 1))

    def quantized(self) -> torch.Tensor:
        """The fp32 weight `[out, in]` that the layer computes with."""
        scales, zeros = self.scales_and_zeros()
        weight = ((self.codes.float() - zeros[..., None]) * scales[..., None]).view(self.out_features, self.in_features)
        return weight if self.mask is None else weight * self.mask

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x [..., in]` -> `[..., out]`."""
        return F.linear(x, self.quantized(), self.bias)

    @torch.no_grad()
    def compressed(self) -> CompressedWeight:
        """The weight on its grid; it dequantizes to what `quantized` returns, bit by bit."""
        scales, zeros = self.scales_and_zeros()
        zeros, codes = zeros.to(torch.uint8), self.codes.view(self.out_features, self.in_features)
        if self.mask is not None:
            codes = torch.where(self.mask, codes, zeros.repeat_interleave(self.codes.shape[-1], dim=1))
        return CompressedWeight(self.grid, codes, scales.bfloat16(), zeros)


def check(subject: Subject, options: Any) -> None:
    """Refuse a choice of linears: all that are packed learn."""
    if options.targets is not None:
        raise UserError(f"targets: {options.targets} is not allowed with train: scales; allowed: null, or train: lora")


def describe(options: Any) -> dict[str, Any]:
    """Nothing: there are no options of this way."""
    return {}


@contextmanager
def trainable(model: nn.Module, options: Any, seed: int) -> Iterator[Callable[[], None]]:
    """Scales and zeros learn; afterwards packed layers are where there were packed layers."""
    packed = packed_layers(model)
    model.requires_grad_(False)
    for name, layer in packed.items():
        model.set_submodule(name, ScaledLinear(layer))
    for module in model.modules():
        if isinstance(module, ScaledLinear):
            module.requires_grad_(True)
            if module.bias is not None:
                module.bias.requires_grad_(False)
    try:
        yield lambda: None
    finally:
        for name in packed:
            model.set_submodule(name, _packed(model.get_submodule(name)))


def _packed(linear: ScaledLinear) -> PackedLinear:
    packed = pack(linear, linear.compressed())
    if linear.mask is not None:
        mark_pruned(packed)
    return packed
