"""What the linear and block passes of a recipe do to one block: feed, solve, put in place."""

from dataclasses import replace
from itertools import groupby
from types import ModuleType
from typing import Any, Callable

import torch
from torch import nn

from qlib.layers import PackedLinear, pack
from qlib.layers.held import HeldLinear
from qlib.models.families import family_of
from qlib.prune.mask import PrunedWeight, mark_pruned, mask_of, put_pruned
from qlib.quantize.grid import rows_at_once
from qlib.recipe import BlockContext
from qlib.walk import Visit, feed_groups

__all__ = ["Step", "compress_block", "wants_targets", "reads"]

Step = tuple[ModuleType, Any]

LARGE = 2**27  # weights; as many or more are not solved together with others, for the sake of memory


def wants_targets(steps: list[Step]) -> bool:
    """Whether a pass asks for what the uncompressed model makes of the same text."""
    return any(getattr(module, "TARGETS", False) for module, _ in steps)


def compress_block(
    visit: Visit, steps: list[Step], rounding: Any, plan: dict[str, dict[str, Any]], config: Any, seed: int
) -> dict[str, dict[str, Any]]:
    """Apply linear and block passes, in order, to the block that a walk stands before, in place.

    Args:
        rounding: options of the pass that puts the weights on a grid, for passes that prepare for it; or None.
        plan: options by the linear's path that take the place of those of the steps.
        config: of the model. seed: of everything random; each block draws for itself.

    Returns:
        figures of each linear by its path: name, format, relative error of its weight, share that was kept.
    """
    groups, layers = family_of(config).groups, {}
    planned = {name: plan.get(f"{visit.path}.{name}", {}) for names in groups for name in names}
    for linear, group in groupby(steps, key=lambda step: step[0].SCOPE == "linear"):
        if linear:
            layers |= _solve_linears(visit, groups, list(group), planned)
            continue
        for module, options in group:
            own = options if hasattr(options, "grid") else rounding
            chosen = {name: own and _planned(own, found) for name, found in planned.items()}
            told = (visit.index, visit.path, groups, visit.inputs, visit.targets, chosen, config, seed)
            layers |= _apply_block(visit, module, options, BlockContext(*told))
    return layers


def reads(module: ModuleType, options: Any) -> bool:
    """Whether a pass looks at calibration text."""
    able = hasattr(module, "Statistic") or getattr(module, "CALIBRATES", False)
    return able and getattr(module, "feeds", lambda options: True)(options)


def _feeds(module: ModuleType, options: Any) -> bool:
    """Whether a linear pass feeds on data."""
    return hasattr(module, "Statistic") and reads(module, options)


def _apply_block(visit: Visit, module: ModuleType, options: Any, context: BlockContext) -> dict[str, dict[str, Any]]:
    """Apply a block pass; returns figures of the linears that it packed."""
    before = {name: visit.block.get_submodule(name) for names in context.groups for name in names}
    weights = {name: linear.weight.detach().clone() for name, linear in before.items()}
    module.apply(visit.block, options, context)
    figures = {}
    for name, linear in before.items():
        packed = visit.block.get_submodule(name)
        if isinstance(packed, PackedLinear):
            if mask_of(linear) is not None:
                mark_pruned(packed)
            solved = packed.compressed()
            path = f"{visit.path}.{name}"
            figures[path] = {"name": path} | _figures(weights[name], solved, mask_of(linear))
    return figures


@torch.no_grad()
def _solve_linears(
    visit: Visit, groups: tuple[tuple[str, ...], ...], steps: list[Step], planned: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Solve every linear of a block with all `steps` and put the results in place; returns figures per linear."""
    together = [groups] if not any(getattr(options, "true_sequential", False) for _, options in steps) else [[g] for g in groups]
    layers = {}
    for part in together:
        statistics = {names: _statistics(visit.block.get_submodule(names[0]).in_features, steps) for names in part}
        feeds = {names: _feed_all(made) for names, made in statistics.items() if any(made)}
        feed_groups(visit.block, visit.inputs, feeds)
        for names, made in statistics.items():
            size = sum(visit.block.get_submodule(name).weight.numel() for name in names)
            for some, own in _together(names, steps, planned, size):
                layers |= _solve(visit, some, own, made)
            for statistic in filter(None, made):
                statistic.free()
    return layers


def _statistics(width: int, steps: list[Step]) -> list[Any]:
    return [module.Statistic(width, options) if _feeds(module, options) else None for module, options in steps]


def _feed_all(statistics: list[Any]) -> Callable[[torch.Tensor], None]:
    def feed(inputs: torch.Tensor) -> None:
        for statistic in filter(None, statistics):
            statistic.feed(inputs)

    return feed


def _together(
    names: tuple[str, ...], steps: list[Step], planned: dict[str, dict[str, Any]], size: int
) -> list[tuple[tuple[str, ...], list[Step]]]:
    """Which linears of a group are solved as one: all, if every pass says ``TOGETHER`` and a plan keeps options alike.

    Args:
        size: weights of all.
    """
    own = {name: [(module, _planned(options, planned[name])) for module, options in steps] for name in names}
    alike = all(one == own[names[0]] for one in own.values())
    if alike and size <= LARGE and all(hasattr(module, "TOGETHER") for module, _ in steps):
        return [(names, own[names[0]])]
    return [((name,), own[name]) for name in names]


def _solve(visit: Visit, names: tuple[str, ...], steps: list[Step], statistics: list[Any]) -> dict[str, dict[str, Any]]:
    """Solve linears, as one weight, with all steps, each starting from what the one before it left; put results in place."""
    linears = [visit.block.get_submodule(name) for name in names]
    masks = [mask_of(linear) for linear in linears]
    mask = None
    if any(one is not None for one in masks):
        mask = _joined([torch.ones_like(l.weight, dtype=torch.bool) if m is None else m for l, m in zip(linears, masks)])
    solved, pruned = _joined([linear.weight for linear in linears]), [one is not None for one in masks]
    result = None
    for (module, options), statistic in zip(steps, statistics):
        solved = solved if result is None else result.dequantize()
        result = module.solve(solved, options, mask=mask, statistic=statistic)
        if hasattr(module, "PRUNES"):
            mask, pruned = result.mask, [True] * len(linears)
    del solved
    layers, first = {}, 0
    for name, linear, masked in zip(names, linears, pruned):
        rows = slice(first, first + len(linear.weight))
        own, kept = result.rows(rows), mask[rows] if masked else None
        figures = {"name": f"{visit.path}.{name}"} | _figures(linear.weight, own, kept)
        for statistic in filter(None, statistics):
            figures |= getattr(statistic, "notes", {})
        layers[figures["name"]], first = figures, rows.stop
        _put(visit, name, linear, own, kept)
    return layers


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """One below the other; a single one is not copied."""
    return parts[0].detach() if len(parts) == 1 else torch.cat(parts)


def _put(visit: Visit, name: str, linear: nn.Linear, result: Any, mask: torch.Tensor | None) -> None:
    """Write a pruned weight into the linear, or a packed layer into its place."""
    if isinstance(result, PrunedWeight):
        put_pruned(linear, result)
        return
    parent, _, leaf = name.rpartition(".")
    packed = pack(linear, result) if visit.runs else HeldLinear(result, linear.bias)
    if mask is not None:
        mark_pruned(packed)
    setattr(visit.block.get_submodule(parent), leaf, packed)


def _figures(weight: torch.Tensor, solved: Any, mask: torch.Tensor | None) -> dict[str, Any]:
    """What the record tells of a linear: its format, the relative error of its weight, the share that was kept."""
    step, off, whole, stayed = rows_at_once(weight), 0.0, 0.0, 0
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        part = weight[rows].float()
        whole += part.square().sum()
        off += part.sub_(solved.rows(rows).dequantize()).square().sum()
        stayed += 0 if mask is None else mask[rows].sum()
    grid = "bf16" if isinstance(solved, PrunedWeight) else solved.grid.name
    return {"grid": grid, "error": (off / whole).sqrt().item(), "kept": 1.0 if mask is None else stayed.item() / weight.numel()}


def _planned(options: Any, planned: dict[str, Any]) -> Any:
    """The options with the planned values of those it has."""
    known = {name: value for name, value in planned.items() if name in options.__dataclass_fields__}
    return replace(options, **known) if known else options
