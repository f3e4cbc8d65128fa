"""AWQ (Lin et al. 2023, arXiv:2306.00978): before rounding, make the weights of large inputs larger.

A factor s > 1 on an input channel of the weight, and 1/s on the input, change nothing, but the channel's rounding error
then counts 1/s as long as its group's range hardly grows. The paper's s = mean|x|^a has one exponent, searched for the
least error of the outputs (equation 4); then each group's range is cut where that lowers the error. Here the search
counts the cut in: in 2 and 3 bits a scale that was best without the cut was worse than none with it.

With G = X^T X of the inputs the squared output error of a change D of the weight is tr(D G D^T). So one pass over the
text serves the whole search, and nothing is run again.
"""

from dataclasses import dataclass, field

import torch
from torch import nn

from qlib.quantize.grid import Grid, fit_grid, round_to_grid
from qlib.recipe import BlockContext
from qlib.transforms.rescale import by_channel, by_input, rescale
from qlib.walk import feed_groups

__all__ = ["Options", "SCOPE", "PREPARES", "CALIBRATES", "Inputs", "apply", "scale_error", "cut_ranges"]

SCOPE = "block"
PREPARES = True
CALIBRATES = True
#: Shares of a group's range that are tried, from all of it down to half; and, while a scale is searched, only these.
CUTS = tuple(1 - step / 20 for step in range(11))
FEW_CUTS = CUTS[::2]


@dataclass(frozen=True)
class Options:
    """Options of an AWQ pass.

    Args:
        steps: exponents tried, spread evenly from 0 to below 1; with 1 and without weights nothing is scaled.
        weights: also try scales in which the weights take part, mean|x|^a / mean|w|^(1-a).
        clip: cut the ranges of the groups as well.
    """

    steps: int = field(default=10, metadata={"minimum": 1})
    weights: bool = True
    clip: bool = True


class Inputs:
    """Mean magnitude `[in]` and Gram matrix X^T X / n `[in, in]` of the inputs of a group of linears, in fp32."""

    def __init__(self, width: int):
        self.tokens, self.magnitude, self.gram = 0, torch.zeros(width), torch.zeros(width, width)

    def feed(self, inputs: torch.Tensor) -> None:
        """Add inputs `[tokens, in]`. Running means, so that the sums stay in range however much is fed."""
        rows = inputs.float()
        before = self.tokens / (self.tokens + len(rows))
        self.tokens += len(rows)
        self.magnitude = before * self.magnitude.to(rows.device) + rows.abs().sum(0) / self.tokens
        self.gram = before * self.gram.to(rows.device) + rows.T @ rows / self.tokens


@torch.no_grad()
def apply(block: nn.Module, options: Options, context: BlockContext) -> None:
    """Scale the inputs of every group of linears, then cut the ranges of their weights; in place."""
    seen = {names: Inputs(block.get_submodule(names[0]).in_features) for names in context.groups}
    feed_groups(block, context.inputs, {names: inputs.feed for names, inputs in seen.items()})
    for names, inputs in seen.items():
        weights = [block.get_submodule(name).weight for name in names]
        grids = [context.rounding[name].grid for name in names]
        scales = _candidates(block, names, grids, inputs.magnitude, options)
        spread = [by_input(block, names, scale) for scale in scales]
        cuts = FEW_CUTS if options.clip else ()
        errors = [sum(scale_error(*pair, inputs.gram, one, cuts) for pair in zip(weights, grids)) for one in spread]
        scale = rescale(block, names, scales[errors.index(min(errors))])
        for weight, grid in zip(weights, grids):
            if options.clip:
                weight.copy_(cut_ranges(weight, grid, inputs.gram, scale))


def _candidates(
    block: nn.Module, names: tuple[str, ...], grids: list[Grid], magnitude: torch.Tensor, options: Options
) -> list[torch.Tensor]:
    """Scales `[channels]` to try, the first of them 1; each with the geometric mean of its extremes at 1."""
    magnitude = by_channel(block, names, magnitude).mean(1)
    magnitude = magnitude.clamp(min=1e-4 * magnitude.max().clamp(min=1e-30))  # a dead channel takes no infinite scale
    shares = [step / options.steps for step in range(options.steps)]
    scales = [magnitude**share for share in shares]
    if options.weights:
        rows = torch.cat([_shares(block.get_submodule(name).weight, grid) for name, grid in zip(names, grids)])
        strength = by_channel(block, names, rows.mean(0)).mean(1).clamp(min=1e-4)
        scales += [magnitude**share / strength ** (1 - share) for share in shares]
    return [scale / (scale.max() * scale.min()).sqrt() for scale in scales]


def _shares(weight: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Magnitudes of a weight as shares of the largest of their group, `[out, in]`."""
    grouped = weight.float().abs().view(len(weight), grid.groups(weight.shape[1]), -1)
    return (grouped / grouped.amax(-1, keepdim=True).clamp(min=1e-30)).view(weight.shape)


def scale_error(
    weight: torch.Tensor, grid: Grid, gram: torch.Tensor, scale: torch.Tensor, cuts: tuple[float, ...] = ()
) -> float:
    """Squared output error, per token, of a weight `[out, in]` that is multiplied by `scale`, cut and rounded."""
    scaled = weight.float() * scale
    cut = cut_ranges(scaled, grid, gram, scale, cuts) if cuts else scaled
    change = (_rounded(cut, grid) - scaled) / scale
    return ((change @ gram) * change).sum().item()


def cut_ranges(
    weight: torch.Tensor, grid: Grid, gram: torch.Tensor, scale: torch.Tensor, cuts: tuple[float, ...] = CUTS
) -> torch.Tensor:
    """Clamp each group of a weight `[out, in]` to the share of its range that errs least in its part of the output.

    A later fit to least and greatest weight then finds the range that was cut.

    Args:
        gram: of the inputs before they were divided by `scale` `[in]`.

    Returns:
        fp32 `[out, in]`.
    """
    groups = grid.groups(weight.shape[1])
    grouped, scale = weight.float().view(len(weight), groups, -1), scale.view(groups, 1, -1)
    size = grouped.shape[-1]
    gram = gram.view(groups, size, groups, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [groups, size, size]
    gram = gram / (scale.transpose(1, 2) * scale)
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    best, least = grouped.clone(), torch.full_like(low, torch.inf)
    for cut in cuts:
        clamped = grouped.clamp(low * cut, high * cut)
        change = (_rounded(clamped.reshape(weight.shape), grid).view(grouped.shape) - grouped).transpose(0, 1)
        error = ((change @ gram) * change).sum(-1).T[..., None]  # [out, groups, 1]
        best = torch.where(error < least, clamped, best)
        least = torch.minimum(error, least)
    return best.reshape(weight.shape)


def _rounded(weight: torch.Tensor, grid: Grid) -> torch.Tensor:
    return round_to_grid(weight, grid, *fit_grid(weight, grid)).dequantize()
