"""Train through rounding: a linear that computes with weights on a grid and learns the float weights behind them."""

import torch
import torch.nn.functional as F
from torch import nn

from qlib.layers import PackedLinear, pack
from qlib.prune.mask import mark_pruned, mask_of
from qlib.quantize.grid import CompressedWeight, Grid

__all__ = ["FakeQuantLinear", "fake_quantize", "straight_through", "unpack_for_training", "pack_again"]

#: What a learning rate means here: a weight moves by `CODE_RATE` of it in steps of its scale, a scale by `SCALE_RATE`
#: of it relative to itself. Chosen on development text at 2 and 3 bits.
CODE_RATE = 30.0
SCALE_RATE = 20.0


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, exact: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
        return rounded

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


def straight_through(exact: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """`rounded`, with the gradient of `exact`: the straight-through estimator (Bengio et al. 2013, arXiv:1308.3432).

    The derivative of rounding is zero almost everywhere, so nothing would be learned from the true one.
    """
    return _StraightThrough.apply(exact, rounded)


def fake_quantize(steps: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, levels: int) -> torch.Tensor:
    """Round weights onto a grid so that they, and the scales, can be trained.

    As in LSQ (Esser et al. 2020, arXiv:1902.08153) the gradient passes the rounding unchanged and ends where a code is
    cut. The weights are given in steps of their scale, so that a scale stretches its group and changes no code, as
    where EfficientQAT trains the step sizes end to end (Chen et al. 2024, arXiv:2407.11062). With code =
    cut(round(step) + zero), the derivatives are

    - to a step: the scale where the code lies in 0 .. levels - 1 without being cut, else 0;
    - to the scale: code - zero. LSQ's is smaller by the step itself, since there a scale that grows lowers the codes.

    Args:
        steps: `[out, groups, group size]`. scales, zeros: `[out, groups, 1]`.

    Returns:
        (code - zero) * scale, `[out, groups, group size]`.
    """
    codes = (straight_through(steps, steps.round()) + zeros).clamp(0, levels - 1)
    return (codes - zeros) * scales


class FakeQuantLinear(nn.Module):
    """Stands in for a packed layer while it is trained.

    Attributes:
        latent: fp32 `[out, in]`, what is rounded: the weight in steps of its scale, divided by `CODE_RATE`. Begins
            at the packed layer's codes, so that the layer begins as what it stands in for.
        log_scales: fp32 `[out, groups]`, the logarithm of the scales' magnitudes, divided by `SCALE_RATE`: a step of the
            optimizer is relative, and no scale changes its sign.
        bias: the very parameter of the packed layer, or None.
        zeros: uint8 `[out, groups]`, fixed. mask: bool `[out, in]` or None: false stays zero.
    """

    def __init__(self, packed: PackedLinear) -> None:
        super().__init__()
        compressed = packed.compressed()
        self.grid: Grid = packed.grid
        self.in_features, self.out_features = packed.in_features, packed.out_features
        self.register_buffer("zeros", compressed.zeros)
        self.register_buffer("mask", mask_of(packed))
        codes = self._grouped(compressed.codes.float()) - compressed.zeros.float()[..., None]
        self.latent = nn.Parameter(codes.view(self.out_features, self.in_features) / CODE_RATE)
        self.register_buffer("signs", compressed.scales.float().sign())  # a symmetric range may be turned round
        self.log_scales = nn.Parameter(compressed.scales.float().abs().log() / SCALE_RATE)
        self.register_parameter("bias", packed.bias)

    def _grouped(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.view(self.out_features, self.zeros.shape[1], -1)

    def steps(self) -> torch.Tensor:
        """The weights in steps of their scale, `[out, groups, group size]`."""
        latent = self.latent if self.mask is None else self.latent * self.mask
        return self._grouped(latent) * CODE_RATE

    def scales(self) -> torch.Tensor:
        """fp32 `[out, groups]`, rounded to bf16 as they will be stored."""
        exact = self.signs * (self.log_scales * SCALE_RATE).exp()
        return straight_through(exact, exact.bfloat16().float())

    def quantized(self) -> torch.Tensor:
        """The fp32 weight `[out, in]` that the layer computes with."""
        scales, zeros = self.scales()[..., None], self.zeros.float()[..., None]
        return fake_quantize(self.steps(), scales, zeros, self.grid.levels).view(self.latent.shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x [..., in]` -> `[..., out]`."""
        return F.linear(x, self.quantized(), self.bias)

    @torch.no_grad()
    def compressed(self) -> CompressedWeight:
        """The weight on its grid; it dequantizes to what `quantized` returns, bit by bit."""
        codes = (self.steps().round() + self.zeros.float()[..., None]).clamp(0, self.grid.levels - 1)
        codes = codes.to(torch.uint8).view(self.latent.shape)
        return CompressedWeight(self.grid, codes, self.scales().bfloat16(), self.zeros)


def unpack_for_training(model: nn.Module) -> None:
    """Replace every packed layer of `model` in place by one that can be trained."""
    _replace(model, PackedLinear, FakeQuantLinear)


def pack_again(model: nn.Module) -> None:
    """Replace every layer that `unpack_for_training` made in place by a packed one of the same format."""
    _replace(model, FakeQuantLinear, _packed)


def _packed(linear: FakeQuantLinear) -> PackedLinear:
    packed = pack(linear, linear.compressed())
    if linear.mask is not None:
        mark_pruned(packed)
    return packed


def _replace(model: nn.Module, kind: type[nn.Module], make) -> None:
    """Layer by layer, so that no more than one exists in both forms."""
    for name in [name for name, module in model.named_modules() if isinstance(module, kind)]:
        parent, _, leaf = name.rpartition(".")
        holder = model.get_submodule(parent)
        setattr(holder, leaf, make(getattr(holder, leaf)))
