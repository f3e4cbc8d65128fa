"""A rounding that can be learned: an offset for every weight, two factors for the range of every group."""

import torch

from qlib.quantize.grid import CompressedWeight, Grid

__all__ = ["Rounding"]

TINY = 2.0**-100  # stands in for a scale of zero


class Rounding:
    """How one weight is rounded, as far as it is learned.

    Attributes:
        weight: fp32 `[out, groups, size]`. mask: bool of that shape, false where pruned, or None.
        low, high: the range of a group `[out, groups, 1]`, which holds 0.
        learned: offset V `[out, groups, size]`, and factors of low and high, alpha and beta `[out, groups, 1]`.
    """

    def __init__(self, weight: torch.Tensor, grid: Grid, mask: torch.Tensor | None = None) -> None:
        self.grid, self.shape = grid, weight.shape
        grouped = (len(weight), grid.groups(weight.shape[1]), -1)
        self.mask = None if mask is None else mask.view(grouped)
        self.weight = (weight if mask is None else weight * mask).detach().float().view(grouped)
        self.low, self.high = self.weight.amin(-1, True).clamp(max=0), self.weight.amax(-1, True).clamp(min=0)
        if grid.symmetric:
            self.high = torch.maximum(-self.low, self.high)
            self.low = -self.high
        flat = (self.low == 0) & (self.high == 0)
        self.high = self.high + flat  # of a group of zeros: any scale will do
        ones = torch.ones_like(self.low)
        self.learned = [p.requires_grad_() for p in (torch.zeros_like(self.weight), ones, ones.clone())]

    def scales_and_zeros(self) -> tuple[torch.Tensor, torch.Tensor]:
        """fp32 `[out, groups, 1]`: scales as they are stored, in bf16, and codes that mean 0."""
        _, alpha, beta = (p.detach() for p in self.learned)
        top = self.grid.levels - 1
        scales = ((beta * self.high - alpha * self.low) / top).bfloat16().float().clamp(min=TINY)
        if self.grid.symmetric:
            return scales, torch.full_like(scales, self.grid.levels // 2)
        return scales, (-alpha * self.low / scales).round_().clamp_(0, top)

    def quantized(self) -> torch.Tensor:
        """The weight as it is rounded now `[out, in]`, in bf16, to differentiate by what is learned."""
        return _Quantized.apply(self, *self.learned)

    def compressed(self) -> CompressedWeight:
        """The weight as it is rounded now."""
        scales, zeros = self.scales_and_zeros()
        codes = (self.weight / scales).add_(self.learned[0].detach()).round_().add_(zeros)
        codes = codes.clamp_(0, self.grid.levels - 1)
        codes = codes if self.mask is None else torch.where(self.mask, codes, zeros)
        return CompressedWeight(
            self.grid, codes.to(torch.uint8).view(self.shape), scales[..., 0].bfloat16(), zeros[..., 0].to(torch.uint8)
        )


class _Quantized(torch.autograd.Function):
    """q = s (c - z) with c = cut(round(w / s + V) + z), s = (beta high - alpha low) / top, z = round(-alpha low / s).

    As everywhere, rounding passes gradients on as if it were not there (straight-through); cutting passes them where it
    cuts nothing (i = 1, else 0). That makes, with z constant where the grid is symmetric,

        dq/dV = i s      dq/dz = (i - 1) s      dq/ds = c - z - i w/s

    for a z of its own; since z = round(-alpha low / s), what it gets goes on to alpha and to s.
    """

    @staticmethod
    def forward(ctx, rounding: Rounding, offset: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
        scales, zeros = rounding.scales_and_zeros()
        steps = rounding.weight / scales
        codes = (steps + offset).round_().add_(zeros)
        cut = codes.clamp(0, rounding.grid.levels - 1)
        inside = codes == cut
        centred = cut.sub_(zeros)
        ctx.rounding, ctx.alpha = rounding, alpha
        ctx.save_for_backward(steps, centred, inside, scales)
        quantized = centred * scales
        quantized = quantized if rounding.mask is None else quantized * rounding.mask
        return quantized.bfloat16().view(rounding.shape)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        steps, centred, inside, scales = ctx.saved_tensors
        rounding, low, high = ctx.rounding, ctx.rounding.low, ctx.rounding.high
        top = rounding.grid.levels - 1
        given = gradient.float().view(steps.shape)
        given = given if rounding.mask is None else given * rounding.mask
        through = given * inside
        by_scale = (given * centred - through * steps).sum(-1, keepdim=True)
        by_low = 0.0
        if not rounding.grid.symmetric:
            by_zero = (through - given).sum(-1, keepdim=True) * scales
            by_scale = by_scale + by_zero * ctx.alpha * low / scales.square()
            by_low = -by_zero * low / scales
        return None, through * scales, by_low - by_scale * low / top, by_scale * high / top
