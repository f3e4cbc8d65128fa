"""Shares of weights that go, linear by linear: from one threshold for all, or from outliers; a later pass prunes.

- ``magnitude``: what global magnitude pruning takes of each linear: the smallest weights of all linears together.
- ``outliers`` (OWL, Yin et al. 2023, arXiv:2310.05175): blocks in which more scores |w| ||x|| lie far above the mean keep
  more; all linears of a block alike.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from qlib.errors import UserError
from qlib.models.families import blocks_of, family_of, linears_of
from qlib.models.load import Subject
from qlib.prune import wanda
from qlib.prune.select import check_share
from qlib.recipe import Context
from qlib.walk import feed_groups, walk

__all__ = ["Options", "SCOPE", "CALIBRATES", "NEEDS_FLOAT", "PLANS_SPARSITY", "check", "feeds", "streams", "plan", "global_shares", "outlier_shares"]

SCOPE = "plan"
CALIBRATES = True
NEEDS_FLOAT = True
PLANS_SPARSITY = True


@dataclass(frozen=True)
class Options:
    """Options of an allocation of sparsity; a pass that prunes without a pattern follows it.

    Args:
        sparsity: share of all weights that goes, at least 0 and less than 1.
        by: magnitude or outliers.
        far: outliers are scores above this many times the mean of their block.
        spread: how far the share of a block may lie from `sparsity` at most, roughly; of outliers only.
    """

    sparsity: float = field(default=0.5, metadata={"minimum": 0})
    by: Literal["magnitude", "outliers"] = "outliers"
    far: float = field(default=5.0, metadata={"minimum": 0})
    spread: float = field(default=0.08, metadata={"minimum": 0})

    def __post_init__(self) -> None:
        check_share(self.sparsity)


def feeds(options: Options) -> bool:
    """Whether these options look at text."""
    return options.by == "outliers"


def streams(options: Options) -> bool:
    """Whether it can plan for a model of which one block at a time is there: one threshold needs all weights together."""
    return options.by == "outliers"


def check(subject: Subject, options: Options) -> None:
    """Refuse a spread that could ask for less than nothing or for everything."""
    room = min(options.sparsity, 1 - options.sparsity) / 2
    if options.by == "outliers" and not 0 <= options.spread <= room:
        raise UserError(f"spread: {options.spread} is not allowed with sparsity {options.sparsity}; allowed: 0 to {room:g}")


@torch.no_grad()
def plan(subject: Subject, options: Options, context: Context) -> dict[str, dict[str, Any]]:
    """Sparsity of every linear by its path; `subject.details` gets `sparsities`."""
    where = family_of(subject.model.config).blocks
    if options.by == "magnitude":
        weights = {
            f"{where}.{index}.{name}": linear.weight
            for index, block in enumerate(blocks_of(subject.model))
            for name, linear in linears_of(subject.model, block).items()
        }
        shares = dict(zip(weights, global_shares(list(weights.values()), options.sparsity)))
    else:
        found = [_outliers(visit, subject.config, options.far) for visit in walk(subject.model, context.ids, label="finding outliers")]
        blocks = outlier_shares(found, options.sparsity, options.spread)
        names = [list(linears_of(subject.model, block)) for block in blocks_of(subject.model)]
        shares = {f"{where}.{index}.{name}": share for index, share in enumerate(blocks) for name in names[index]}
        subject.details["outliers"] = found
    subject.details["sparsities"] = shares
    return {path: {"sparsity": share} for path, share in shares.items()}


def global_shares(weights: list[torch.Tensor], sparsity: float) -> list[float]:
    """Of each weight, the share that is among the `sparsity` smallest magnitudes of all of them."""
    sizes = torch.cat([weight.detach().abs().flatten().float() for weight in weights])
    count = round(sparsity * len(sizes))
    gone = torch.zeros(len(sizes), dtype=torch.bool)
    gone[sizes.argsort(stable=True)[:count].cpu()] = True
    return [part.float().mean().item() for part in gone.split([weight.numel() for weight in weights])]


def _outliers(visit: Any, config: Any, far: float) -> float:
    """Share of a block's scores |w| ||x|| above `far` times their mean."""
    groups = family_of(config).groups
    statistics = {names: wanda.Statistic(visit.block.get_submodule(names[0]).in_features, wanda.Options()) for names in groups}
    feed_groups(visit.block, visit.inputs, {names: statistic.feed for names, statistic in statistics.items()})
    scores = torch.cat([
        wanda.scores(visit.block.get_submodule(name).weight, statistic.norms).flatten()
        for names, statistic in statistics.items()
        for name in names
    ])  # fmt: skip
    return (scores > far * scores.mean()).float().mean().item()


def outlier_shares(outliers: list[float], sparsity: float, spread: float) -> list[float]:
    """What goes of each block: less where there are more outliers, `sparsity` on average, twice `spread` between extremes."""
    found = torch.tensor(outliers, dtype=torch.float64)
    width = found.max() - found.min()
    kept = (found - found.min()) / width * 2 * spread if width > 0 else torch.zeros_like(found)
    return (sparsity - (kept - kept.mean())).tolist()
