"""Apply a recipe to a subject: the passes in order, consecutive linear passes in one walk through the model."""

import time
from dataclasses import replace
from itertools import groupby
from types import ModuleType
from typing import Any

import torch
from torch import nn

from qlib.errors import UserError
from qlib.evaluate.memory import track_peak
from qlib.layers import PackedLinear, pack, packed_layers
from qlib.models.families import blocks_of, family_of, linears_of
from qlib.models.load import Subject
from qlib.prune.mask import PrunedWeight, mark_pruned, mask_of, put_pruned
from qlib.recipe import Context, read_recipe
from qlib.record import Measurement
from qlib.walk import walk

__all__ = ["compress"]

Step = tuple[ModuleType, Any]


def compress(subject: Subject, recipe: list[dict[str, Any]], calibration: Any = None, seed: int = 0) -> Subject:
    """Apply `recipe` to `subject.model` in place and return a subject that carries what it cost.

    Args:
        recipe: steps such as ``{"pass": "rtn", "bits": 4}``; see the module of each pass for its options.
        calibration: which text to read (``text``, ``samples``, ``length``), read only if a pass feeds on data.
        seed: draws the calibration windows and whatever else is random.

    Raises:
        UserError: the recipe does not fit the model, told before anything is changed.
    """
    steps = read_recipe(recipe)
    _check(subject, steps)
    context = Context(_calibration_ids(subject, steps, calibration, seed), seed)
    layers: dict[str, dict[str, Any]] = {}
    plan: dict[str, dict[str, Any]] = {}
    passes = []
    with track_peak() as peak:
        for group in _stages(steps):
            (module, options), begun = group[0], time.perf_counter()
            if module.SCOPE == "linear":
                layers |= _solve_linears(subject.model, group, context.ids, plan)
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

    A mix names for each linear of a block the share of blocks that have it in each format.
    """
    blocks = blocks_of(subject.model)
    formats: dict[str, list[str]] = {}
    for block in blocks:
        for name, linear in linears_of(subject.model, block).items():
            formats.setdefault(name, []).append(linear.grid.name if isinstance(linear, PackedLinear) else "bf16")
    narrowed = subject.details.get("narrowed", "")
    known = sorted({one for column in formats.values() for one in column})
    if len(known) == 1:
        return {"shape_format": known[0] + narrowed}
    mix = {
        name: {one + narrowed: column.count(one) / len(column) for one in dict.fromkeys(column)}
        for name, column in formats.items()
    }
    return {"shape_format": None, "mix": mix}


def _name(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2]


def _trains(module: ModuleType) -> bool:
    return module.__name__.startswith("qlib.train.")


def _stages(steps: list[Step]) -> list[list[Step]]:
    """Consecutive linear passes together, every other pass alone."""
    stages: list[list[Step]] = []
    for linear, group in groupby(steps, key=lambda step: step[0].SCOPE == "linear"):
        stages += [list(group)] if linear else [[step] for step in group]
    return stages


def _check(subject: Subject, steps: list[Step]) -> None:
    """Refuse what cannot work: a grid on top of a grid, group sizes that do not divide, and what the passes refuse."""
    gridded = [_name(module) for module, options in steps if hasattr(options, "grid")]
    if len(gridded) > 1:
        raise UserError(f"recipe: passes {', '.join(gridded)} each put the weights on a grid; only one of them can")
    if gridded and packed_layers(subject.model):
        raise UserError(f"recipe: pass '{gridded[0]}' needs float weights, but the model is already packed")
    packed = bool(packed_layers(subject.model))
    for index, (module, options) in enumerate(steps):
        if packed and getattr(module, "NEEDS_FLOAT", False):
            raise UserError(f"recipe[{index}]: pass '{_name(module)}' must come before the weights are put on a grid")
        packed = packed or hasattr(options, "grid")
        if hasattr(module, "check"):
            try:
                module.check(subject, options)
            except UserError as error:
                raise UserError(f"recipe[{index}].{error}") from None
        grid = getattr(options, "grid", None)
        for name, linear in linears_of(subject.model, blocks_of(subject.model)[0]).items():
            if grid and grid.group_size and linear.in_features % grid.group_size:
                fit = [str(size) for size in (32, 64, 128) if linear.in_features % size == 0]
                raise UserError(
                    f"recipe[{index}].group_size: {grid.group_size} does not divide the {linear.in_features} input "
                    f"channels of {name}; allowed here: {', '.join([*fit, 'null'])}"
                )


def _calibration_ids(subject: Subject, steps: list[Step], calibration: Any, seed: int) -> list[torch.Tensor]:
    """Token ids for the passes that feed on data; none are read for those that do not."""
    if not any(hasattr(module, "Statistic") or getattr(module, "CALIBRATES", False) for module, _ in steps):
        return []
    if calibration is None:
        raise UserError("calibration: is missing, but a pass of the recipe feeds on data")
    from qlib.data.calibration import read_calibration

    return read_calibration(subject.tokenizer, calibration, seed)


def _solve_linears(
    model: nn.Module, steps: list[Step], ids: list[torch.Tensor], plan: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Solve every linear with all `steps` in one walk and put the results in place; returns figures per linear.

    Args:
        plan: options by the linear's path that take the place of those of the steps.
    """
    layers: dict[str, dict[str, Any]] = {}
    open_statistics: dict[tuple[str, ...], list[Any]] = {}

    def open_group(index: int, block: nn.Module, names: tuple[str, ...]):
        width = block.get_submodule(names[0]).in_features
        made = [module.Statistic(width, options) if hasattr(module, "Statistic") else None for module, options in steps]
        open_statistics[names] = made
        fed = [statistic for statistic in made if statistic]
        return (lambda inputs: [statistic.feed(inputs) for statistic in fed]) if fed else None

    def close_group(index: int, block: nn.Module, names: tuple[str, ...]) -> None:
        for name in names:
            path = f"{family_of(model.config).blocks}.{index}.{name}"
            linear = block.get_submodule(name)
            own = [(module, _planned(options, plan.get(path, {}))) for module, options in steps]
            layers[path] = {"name": path} | _solve_one(block, name, linear, own, open_statistics[names])
        for statistic in open_statistics.pop(names):
            if statistic is not None:
                statistic.free()

    walk(model, ids, open_group, close_group)
    return layers


def _solve_one(
    block: nn.Module, name: str, linear: nn.Linear, steps: list[Step], statistics: list[Any]
) -> dict[str, Any]:
    """Solve one linear with all steps, each starting from what the one before it left, and put the result in place."""
    weight, mask = linear.weight.detach(), mask_of(linear)
    solved = weight
    for (module, options), statistic in zip(steps, statistics):
        result = module.solve(solved, options, mask=mask, statistic=statistic)
        mask = result.mask if isinstance(result, PrunedWeight) else mask
        solved = result.dequantize()
    error = ((solved - weight.float()).norm() / weight.float().norm()).item()
    kept = 1.0 if mask is None else mask.float().mean().item()
    if isinstance(result, PrunedWeight):
        put_pruned(linear, result)
        return {"grid": "bf16", "error": error, "kept": kept}
    parent, _, leaf = name.rpartition(".")
    packed = pack(linear, result)
    if mask is not None:
        mark_pruned(packed)
    setattr(block.get_submodule(parent), leaf, packed)
    return {"grid": result.grid.name, "error": error, "kept": kept}


def _planned(options: Any, planned: dict[str, Any]) -> Any:
    """The options with the planned values of those it has."""
    known = {name: value for name, value in planned.items() if name in options.__dataclass_fields__}
    return replace(options, **known) if known else options
