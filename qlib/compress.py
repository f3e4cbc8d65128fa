"""Apply a recipe to a subject: the passes in order, consecutive linear passes in one walk through the model."""

import time
from itertools import groupby
from types import ModuleType
from typing import Any

import torch
from torch import nn

from qlib.errors import UserError
from qlib.evaluate.memory import track_peak
from qlib.layers import pack, packed_layers
from qlib.models.families import blocks_of, family_of, linears_of
from qlib.models.load import Subject
from qlib.recipe import read_recipe
from qlib.record import Measurement
from qlib.walk import walk

__all__ = ["compress"]

Step = tuple[ModuleType, Any]


def compress(subject: Subject, recipe: list[dict[str, Any]], calibration: Any = None, seed: int = 0) -> Subject:
    """Apply `recipe` to `subject.model` in place and return a subject that carries what it cost.

    Args:
        recipe: steps such as ``{"pass": "rtn", "bits": 4}``; see the module of each pass for its options.
        calibration: which text to read (``text``, ``samples``, ``length``), read only if a pass feeds on data.
        seed: draws the calibration windows.

    Raises:
        UserError: the recipe does not fit the model, told before anything is changed.
    """
    steps = read_recipe(recipe)
    _check(subject, steps)
    ids = _calibration_ids(subject, steps, calibration, seed)
    layers: list[dict[str, Any]] = []
    begun = time.perf_counter()
    with track_peak() as peak:
        for scope, group in groupby(steps, key=lambda step: step[0].SCOPE):
            if scope == "linear":
                layers += _solve_linears(subject.model, list(group), ids)
            else:
                for module, options in group:
                    subject = module.apply(subject, options)
    costs = {
        "compress.seconds": Measurement(time.perf_counter() - begun, "seconds", 1, method="wall time of all passes"),
        "compress.peak_rss_bytes": Measurement(peak.bytes, "bytes", 1, method="highest anonymous memory of the process, sampled"),
    }
    if ids:
        tokens = sum(batch.numel() for batch in ids)
        costs["compress.calibration_tokens"] = Measurement(tokens, "tokens", 1, method="token ids fed to the passes")
    return Subject(
        subject.model,
        subject.tokenizer,
        subject.config,
        subject.source,
        subject.measurements | costs,
        subject.details | {"layers": layers, "shape_format": _shape_format(layers)},
    )


def _check(subject: Subject, steps: list[Step]) -> None:
    """Refuse what cannot work: a grid on top of a grid, group sizes that do not divide."""
    gridded = [module.__name__.rpartition(".")[2] for module, options in steps if hasattr(options, "grid")]
    if len(gridded) > 1:
        raise UserError(f"recipe: passes {', '.join(gridded)} each put the weights on a grid; only one of them can")
    if gridded and packed_layers(subject.model):
        raise UserError(f"recipe: pass '{gridded[0]}' needs float weights, but the model is already packed")
    for index, (module, options) in enumerate(steps):
        grid = getattr(options, "grid", None)
        for name, linear in linears_of(subject.model, blocks_of(subject.model)[0]).items():
            if grid and grid.group_size and linear.in_features % grid.group_size:
                fit = [str(size) for size in (32, 64, 128) if linear.in_features % size == 0]
                raise UserError(
                    f"recipe[{index}].group_size: {grid.group_size} does not divide the {linear.in_features} input "
                    f"channels of {name}; allowed here: {', '.join([*fit, 'null'])}"
                )


def _shape_format(layers: list[dict[str, Any]]) -> str | None:
    """The format under which the speed records know this model; None where linears differ."""
    grids = {layer["grid"] for layer in layers}
    return grids.pop() if len(grids) == 1 else None


def _calibration_ids(subject: Subject, steps: list[Step], calibration: Any, seed: int) -> list[torch.Tensor]:
    """Token ids for the passes that feed on data; none are read for those that do not."""
    if not any(hasattr(module, "Statistic") for module, _ in steps):
        return []
    if calibration is None:
        raise UserError("calibration: is missing, but a pass of the recipe feeds on data")
    from qlib.data.calibration import read_calibration

    return read_calibration(subject.tokenizer, calibration, seed)


def _solve_linears(model: nn.Module, steps: list[Step], ids: list[torch.Tensor]) -> list[dict[str, Any]]:
    """Solve every linear with all `steps` in one walk and replace it by its packed layer; returns figures per layer."""
    layers: list[dict[str, Any]] = []
    open_statistics: dict[tuple[str, ...], list[Any]] = {}

    def open_group(index: int, block: nn.Module, names: tuple[str, ...]):
        width = block.get_submodule(names[0]).in_features
        made = [module.Statistic(width, options) if hasattr(module, "Statistic") else None for module, options in steps]
        open_statistics[names] = made
        fed = [statistic for statistic in made if statistic]
        return (lambda inputs: [statistic.feed(inputs) for statistic in fed]) if fed else None

    def close_group(index: int, block: nn.Module, names: tuple[str, ...]) -> None:
        for name in names:
            linear = block.get_submodule(name)
            weight = linear.weight.detach()
            solved = weight
            for (module, options), statistic in zip(steps, open_statistics[names]):
                data = () if statistic is None else (statistic,)
                compressed = module.solve(solved, options, *data)
                solved = compressed.dequantize()
            parent, _, leaf = name.rpartition(".")
            setattr(block.get_submodule(parent), leaf, pack(linear, compressed))
            error = (solved - weight.float()).norm() / weight.float().norm()
            path = f"{family_of(model.config).blocks}.{index}.{name}"
            layers.append({"name": path, "grid": compressed.grid.name, "error": error.item()})
        for statistic in open_statistics.pop(names):
            if statistic is not None:
                statistic.free()

    walk(model, ids, open_group, close_group)
    return layers
