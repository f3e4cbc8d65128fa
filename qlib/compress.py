"""Apply a recipe to a subject: the passes in order, consecutive linear and block passes in one walk through the model."""

import time
from dataclasses import replace
from itertools import groupby
from types import ModuleType
from typing import Any

import torch
from torch import nn

from qlib.allocator import keep_freed_memory
from qlib.blockwise import Step, compress_block, reads, wants_targets
from qlib.errors import UserError
from qlib.evaluate.memory import track_peak
from qlib.layers import PackedLinear
from qlib.layers.sparse_storage import count_survivors
from qlib.models.families import blocks_of, family_of, linears_of
from qlib.models.load import Subject
from qlib.prune.mask import is_pruned
from qlib.recipe import Context, pass_name, read_recipe
from qlib.refuse import check_recipe
from qlib.record import Measurement
from qlib.walk import walk

__all__ = ["compress", "stages", "later_grid", "calibration_ids", "WALKED"]

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
    context = Context(calibration_ids(subject, steps, calibration, seed), seed)
    layers: dict[str, dict[str, Any]] = {}
    plan: dict[str, dict[str, Any]] = {}
    passes = []
    with track_peak() as peak:
        for group in stages(steps):
            (module, options), begun = group[0], time.perf_counter()
            if module.SCOPE in WALKED:
                layers |= _walk(subject.model, group, later_grid(steps, group), context, plan)
            elif module.SCOPE == "plan":
                plan |= module.plan(subject, options, context)
            else:
                subject = module.apply(subject, options, context)
            passes.append({"passes": [pass_name(module) for module, _ in group], "seconds": time.perf_counter() - begun})
    spent = sum(one["seconds"] for one, group in zip(passes, stages(steps)) if not _trains(group[0][0]))
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


def _trains(module: ModuleType) -> bool:
    return module.__name__.startswith("qlib.train.")


def stages(steps: list[Step]) -> list[list[Step]]:
    """Consecutive passes of one walk together, every other pass alone."""
    found: list[list[Step]] = []
    for walked, group in groupby(steps, key=lambda step: step[0].SCOPE in WALKED):
        found += [list(group)] if walked else [[step] for step in group]
    return found


def later_grid(steps: list[Step], group: list[Step]) -> Any:
    """Options of the pass that puts weights on a grid, in this stage or a later one; None if there is none."""
    return next((options for _, options in steps[steps.index(group[0]) :] if hasattr(options, "grid")), None)


def calibration_ids(subject: Subject, steps: list[Step], calibration: Any, seed: int) -> list[torch.Tensor]:
    """Token ids for the passes that feed on data; none are read for those that do not."""
    if not any(reads(module, options) for module, options in steps):
        return []
    if calibration is None:
        raise UserError("calibration: is missing, but a pass of the recipe feeds on data")
    if isinstance(calibration, list):
        return calibration
    from qlib.data.calibration import read_calibration

    return read_calibration(subject.tokenizer, calibration, seed)


def _walk(
    model: nn.Module, steps: list[Step], rounding: Any, context: Context, plan: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Apply linear and block passes to every block in one walk; returns figures per linear (see `compress_block`)."""
    layers = {}
    for visit in walk(model, context.ids, wants_targets(steps)):
        layers |= compress_block(visit, steps, rounding, plan, model.config, context.seed)
    return layers
