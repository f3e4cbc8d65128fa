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

from qlib.quantize.grid import Grid, fit_range, nearest_steps, rows_at_once, scale_values
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
#: Rows of a weight that meet a Gram matrix together, at least: it is read once for all of them.
PRODUCT_ROWS = 128


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
    inner, total = _inner(gram, grid, scale) if cuts else None, 0.0
    for rows in weight.split(_rows(weight, grid)):
        scaled = rows.float() * scale
        groups, low, high = _grouped(scaled, grid)
        share = _best_shares(groups, low, high, grid, inner, cuts) if cuts else torch.ones_like(low)
        change = (_clamped_and_rounded(groups, low, high, share, grid).view_as(scaled) - scaled).div_(scale)
        total += (change @ gram).mul_(change).sum().item()
    return total


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
    inner, found = _inner(gram, grid, scale), torch.empty(weight.shape, device=weight.device)
    for rows, cut in zip(*(one.split(_rows(weight, grid)) for one in (weight, found))):
        groups, low, high = _grouped(rows.float(), grid)
        share = _best_shares(groups, low, high, grid, inner, cuts)
        cut.copy_(groups.clamp(low * share, high * share).view_as(cut))
    return found


def _rows(weight: torch.Tensor, grid: Grid) -> int:
    """Rows to work on together: few, so that they fit a cache; all where one scale is that of the whole weight."""
    whole = grid.element == "nvfp4" or grid.group_size == "tensor"
    return len(weight) if whole else max(rows_at_once(weight), PRODUCT_ROWS)


def _inner(gram: torch.Tensor, grid: Grid, scale: torch.Tensor) -> torch.Tensor:
    """What each group's inputs, divided by `scale`, have in common: `[groups, size, size]` of the Gram matrix."""
    groups = grid.groups(len(gram))
    scale = scale.view(groups, 1, -1)
    gram = gram.view(groups, scale.shape[-1], groups, -1).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    return gram / (scale.transpose(1, 2) * scale)


def _grouped(rows: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Groups `[rows, groups, size]`, and the least and greatest of each `[rows, groups, 1]`."""
    groups = rows.view(len(rows), grid.groups(rows.shape[1]), -1)
    return groups, groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)


def _best_shares(
    groups: torch.Tensor, low: torch.Tensor, high: torch.Tensor, grid: Grid, inner: torch.Tensor, cuts: tuple[float, ...]
) -> torch.Tensor:
    """Of `cuts`, for each group, the share of its range with the least error of its part of the output, the first of equals."""
    best, least = torch.ones_like(low), torch.full_like(low, torch.inf)
    for cut in cuts:
        change = _clamped_and_rounded(groups, low, high, torch.full_like(low, cut), grid).sub_(groups).transpose(0, 1)
        error = (change @ inner).mul_(change).sum(-1).T[..., None]  # [rows, groups, 1]
        best = best.masked_fill_(error < least, cut)
        least = torch.minimum(error, least)
    return best


def _clamped_and_rounded(
    groups: torch.Tensor, low: torch.Tensor, high: torch.Tensor, share: torch.Tensor, grid: Grid
) -> torch.Tensor:
    """Groups, clamped to a share of their ranges, and rounded to the grid that is fitted to what is left."""
    low, high = low * share, high * share
    fit = fit_range(low.clamp(max=0)[..., 0], high.clamp(min=0)[..., 0], grid)
    factors, zeros = scale_values(fit.scales, fit.tensor_scale)[..., None], fit.zeros.float()[..., None]
    return nearest_steps(groups.clamp(low, high), grid, factors, zeros).mul_(factors)
