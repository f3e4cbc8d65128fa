"""Apply a recipe to a subject: the passes in order, consecutive linear and block passes in one walk through the model."""

import time
from dataclasses import replace
from itertools import groupby
from types import ModuleType
from typing import Any, Callable

import torch
from torch import nn

from qlib.allocator import keep_freed_memory
from qlib.errors import UserError
from qlib.evaluate.memory import track_peak
from qlib.layers import PackedLinear, pack
from qlib.layers.sparse_storage import count_survivors
from qlib.models.families import blocks_of, family_of, linears_of
from qlib.models.load import Subject
from qlib.prune.mask import PrunedWeight, is_pruned, mark_pruned, mask_of, put_pruned
from qlib.quantize.grid import rows_at_once
from qlib.recipe import BlockContext, Context, read_recipe
from qlib.refuse import check_recipe
from qlib.record import Measurement
from qlib.walk import Visit, feed_groups, walk

__all__ = ["compress"]

Step = tuple[ModuleType, Any]
#: Scopes of passes that are applied block by block, all in one walk.
WALKED = ("linear", "block")


def compress(subject: Subject, recipe: list[dict[str, Any]], calibration: Any = None, seed: int = 0) -> Subject:
    """Apply `recipe` to `subject.model` in place and return a subject that carries what it cost.

    Args:
        recipe: steps such as ``{"pass": "rtn", "bits": 4}``; see the module of each pass for its options.
        calibration: which text to read (``text``, ``samples``, ``length``), read only if a pass feeds on data; or the
            batches of token ids `[rows, tokens]` themselves.
        seed: draws the calibration windows and whatever else is random.

    Raises:
        UserError: the recipe does not fit the model, told before anything is changed.
    """
    keep_freed_memory()
    steps = read_recipe(recipe)
    check_recipe(subject, steps)
    context = Context(_calibration_ids(subject, steps, calibration, seed), seed)
    layers: dict[str, dict[str, Any]] = {}
    plan: dict[str, dict[str, Any]] = {}
    passes = []
    with track_peak() as peak:
        for group in _stages(steps):
            (module, options), begun = group[0], time.perf_counter()
            if module.SCOPE in WALKED:
                layers |= _walk(subject.model, group, _later_grid(steps, group), context, plan)
            elif module.SCOPE == "plan":
                plan |= module.plan(subject, options, context)
            else:
                subject = module.apply(subject, options, context)
            passes.append({"passes": [_name(module) for module, _ in group], "seconds": time.perf_counter() - begun})
    spent = sum(one["seconds"] for one, group in zip(passes, _stages(steps)) if not _trains(group[0][0]))
    costs = {
        "compress.seconds": Measurement(spent, "seconds", 1, method="wall time of all passes but training"),
        "compress.peak_rss_bytes": Measurement(peak.bytes, "bytes", 1, method="highest anonymous memory of the process, sampled"),
    }
    if context.ids:
        tokens = sum(batch.numel() for batch in context.ids)
        costs["compress.calibration_tokens"] = Measurement(tokens, "tokens", 1, method="token ids fed to the passes")
    details = {"layers": list(layers.values()), "passes": passes} | shape_details(subject)
    return replace(subject, measurements=subject.measurements | costs, details=subject.details | details)


def shape_details(subject: Subject) -> dict[str, Any]:
    """Under which format the speed records know this model: `shape_format`, and `mix` where linears differ.

    A mix names for each linear of a block the share of blocks that have it in each format. Where weights were pruned,
    `kept` tells the share of the weights of all linears that is not 0.
    """
    blocks = blocks_of(subject.model)
    linears = [linear for block in blocks for linear in linears_of(subject.model, block).values()]
    kept = {}
    if any(map(is_pruned, linears)):
        weights = [linear.out_features * linear.in_features for linear in linears]
        stayed = [count_survivors(linear) if is_pruned(linear) else count for linear, count in zip(linears, weights)]
        whole = {"heads": 1.0, "ffn": 1.0, "layers": 1.0}
        kept = {"kept": whole | subject.details.get("kept", {}) | {"weights": sum(stayed) / sum(weights)}}
    formats: dict[str, list[str]] = {}
    for block in blocks:
        for name, linear in linears_of(subject.model, block).items():
            formats.setdefault(name, []).append(_format_of(linear))
    narrowed = subject.details.get("narrowed", "")
    known = sorted({one for column in formats.values() for one in column})
    if len(known) == 1:
        return kept | {"shape_format": known[0] + narrowed}
    mix = {
        name: {one + narrowed: column.count(one) / len(column) for one in dict.fromkeys(column)}
        for name, column in formats.items()
    }
    return kept | {"shape_format": None, "mix": mix}


def _format_of(linear: nn.Module) -> str:
    """Name of a linear's format; an adapter beside the codes takes time of its own, so the format is another."""
    if not isinstance(linear, PackedLinear):
        return "bf16"
    return linear.grid.name + ("" if linear.adapter_up is None else f"+r{linear.adapter_up.shape[1]}")


def _name(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2]


def _trains(module: ModuleType) -> bool:
    return module.__name__.startswith("qlib.train.")


def _stages(steps: list[Step]) -> list[list[Step]]:
    """Consecutive passes of one walk together, every other pass alone."""
    stages: list[list[Step]] = []
    for walked, group in groupby(steps, key=lambda step: step[0].SCOPE in WALKED):
        stages += [list(group)] if walked else [[step] for step in group]
    return stages


def _later_grid(steps: list[Step], group: list[Step]) -> Any:
    """Options of the pass that puts weights on a grid, in this stage or a later one; None if there is none."""
    return next((options for _, options in steps[steps.index(group[0]) :] if hasattr(options, "grid")), None)


def _calibration_ids(subject: Subject, steps: list[Step], calibration: Any, seed: int) -> list[torch.Tensor]:
    """Token ids for the passes that feed on data; none are read for those that do not."""
    if not any(_reads(module, options) for module, options in steps):
        return []
    if calibration is None:
        raise UserError("calibration: is missing, but a pass of the recipe feeds on data")
    if isinstance(calibration, list):
        return calibration
    from qlib.data.calibration import read_calibration

    return read_calibration(subject.tokenizer, calibration, seed)


def _reads(module: ModuleType, options: Any) -> bool:
    """Whether a pass looks at calibration text."""
    able = hasattr(module, "Statistic") or getattr(module, "CALIBRATES", False)
    return able and getattr(module, "feeds", lambda options: True)(options)


def _feeds(module: ModuleType, options: Any) -> bool:
    """Whether a linear pass feeds on data."""
    return hasattr(module, "Statistic") and _reads(module, options)


def _walk(
    model: nn.Module, steps: list[Step], rounding: Any, context: Context, plan: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Apply linear and block passes to every block in one walk; returns figures per linear.

    Args:
        rounding: options of the pass that puts the weights on a grid, for passes that prepare for it; or None.
        plan: options by the linear's path that take the place of those of the steps.
    """
    groups, layers = family_of(model.config).groups, {}
    targets = any(getattr(module, "TARGETS", False) for module, _ in steps)
    for visit in walk(model, context.ids, targets):
        planned = {name: plan.get(f"{visit.path}.{name}", {}) for names in groups for name in names}
        for linear, group in groupby(steps, key=lambda step: step[0].SCOPE == "linear"):
            if linear:
                layers |= _solve_linears(visit, groups, list(group), planned)
                continue
            for module, options in group:
                own = options if hasattr(options, "grid") else rounding
                chosen = {name: own and _planned(own, found) for name, found in planned.items()}
                told = (visit.index, visit.path, groups, visit.inputs, visit.targets, chosen, model.config, context.seed)
                layers |= _apply_block(visit, module, options, BlockContext(*told))
    return layers


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
            figures[path] = {"name": path} | _figures(weights[name], solved.dequantize(), solved.grid.name, mask_of(linear))
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
            for some, own in _together(names, steps, planned):
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
    names: tuple[str, ...], steps: list[Step], planned: dict[str, dict[str, Any]]
) -> list[tuple[tuple[str, ...], list[Step]]]:
    """Which linears of a group are solved as one: all, if every pass says ``TOGETHER`` and a plan keeps options alike."""
    own = {name: [(module, _planned(options, planned[name])) for module, options in steps] for name in names}
    alike = all(one == own[names[0]] for one in own.values())
    if alike and all(hasattr(module, "TOGETHER") for module, _ in steps):
        return [(names, own[names[0]])]
    return [((name,), own[name]) for name in names]


def _solve(visit: Visit, names: tuple[str, ...], steps: list[Step], statistics: list[Any]) -> dict[str, dict[str, Any]]:
    """Solve linears, as one weight, with all steps, each starting from what the one before it left; put results in place."""
    linears = [visit.block.get_submodule(name) for name in names]
    weight, masks = torch.cat([linear.weight for linear in linears]), [mask_of(linear) for linear in linears]
    mask = None
    if any(one is not None for one in masks):
        mask = torch.cat([torch.ones_like(l.weight, dtype=torch.bool) if m is None else m for l, m in zip(linears, masks)])
    solved, pruned = weight, [one is not None for one in masks]
    for (module, options), statistic in zip(steps, statistics):
        result = module.solve(solved, options, mask=mask, statistic=statistic)
        if hasattr(module, "PRUNES"):
            mask, pruned = result.mask, [True] * len(linears)
        solved = result.dequantize()
    layers, first = {}, 0
    for name, linear, masked in zip(names, linears, pruned):
        rows = slice(first, first + len(linear.weight))
        own, kept = result.rows(rows), mask[rows] if masked else None
        grid = "bf16" if isinstance(own, PrunedWeight) else own.grid.name
        figures = {"name": f"{visit.path}.{name}"} | _figures(weight[rows], solved[rows], grid, kept)
        for statistic in filter(None, statistics):
            figures |= getattr(statistic, "notes", {})
        layers[figures["name"]], first = figures, rows.stop
        _put(visit.block, name, linear, own, kept)
    return layers


def _put(block: nn.Module, name: str, linear: nn.Linear, result: Any, mask: torch.Tensor | None) -> None:
    """Write a pruned weight into the linear, or a packed layer into its place."""
    if isinstance(result, PrunedWeight):
        put_pruned(linear, result)
        return
    parent, _, leaf = name.rpartition(".")
    packed = pack(linear, result)
    if mask is not None:
        mark_pruned(packed)
    setattr(block.get_submodule(parent), leaf, packed)


def _figures(weight: torch.Tensor, solved: torch.Tensor, grid: str, mask: torch.Tensor | None) -> dict[str, Any]:
    """What the record tells of a linear: its format, the relative error of its weight, the share that was kept."""
    pairs = zip(solved.split(rows_at_once(weight)), weight.split(rows_at_once(weight)))
    off, whole = (sum(one) for one in zip(*(((a - b.float()).square().sum(), b.float().square().sum()) for a, b in pairs)))
    return {"grid": grid, "error": (off / whole).sqrt().item(), "kept": 1.0 if mask is None else mask.float().mean().item()}


def _planned(options: Any, planned: dict[str, Any]) -> Any:
    """The options with the planned values of those it has."""
    known = {name: value for name, value in planned.items() if name in options.__dataclass_fields__}
    return replace(options, **known) if known else options
