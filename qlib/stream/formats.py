"""The formats that a stream writes: what each holds of a block, and what it cannot say, known before any block is solved."""

import os
import re
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, Iterable, NamedTuple

import torch
from torch import nn

from qlib.blockwise import Step, reads
from qlib.errors import UserError
from qlib.layers import PackedLinear
from qlib.models.families import blocks_of, family_of, linears_of
from qlib.models.load import Subject
from qlib.models.save import FORMATS, checkpoint_tensors, write_rest
from qlib.progress import progress
from qlib.quantize.formats import Grid
from qlib.quantize.grid import fit_grid
from qlib.recipe import Context
from qlib.stream.files import Layout, in_order, write_json
from qlib.stream.source import Stored

__all__ = ["check_format", "entry_of", "grids_of", "check_scales", "block_tensors", "end_tensors", "write_beside"]

HALF = ("gptq", "gguf")  # formats whose scales of integers are fp16


class Sketch(NamedTuple):
    """What is known of a packed linear before there is one."""

    grid: Grid
    in_features: int
    out_features: int


def check_format(subject: Subject, steps: list[Step], format: str, seed: int) -> None:
    """Refuse what the format cannot say of the model that the recipe will leave.

    Raises:
        UserError: an unknown format, or the reason.
    """
    if format not in FORMATS:
        raise UserError(f"format: '{format}' is unknown; allowed: {', '.join(FORMATS)}")
    entry_of(subject, steps, _early_plan(subject, steps, seed), format)


def _early_plan(subject: Subject, steps: list[Step], seed: int) -> dict[str, dict[str, Any]]:
    """What plan passes choose that look at shapes alone. Those that read text choose no grid, and take long."""
    plan: dict[str, dict[str, Any]] = {}
    for module, options in steps:
        if module.SCOPE == "plan" and not reads(module, options):
            plan |= module.plan(subject, options, Context([], seed))
    return plan


def entry_of(subject: Subject, steps: list[Step], plan: dict[str, dict[str, Any]], format: str) -> dict[str, Any]:
    """``quantization_config`` of config.json for the whole model; empty where blocks make an entry, or none is needed.

    Args:
        plan: options by the linear's path, as plan passes chose them.

    Raises:
        UserError: the format cannot say what the recipe will leave; it says which linear and why.
    """
    if format in ("packed", "dense"):
        return {}
    grids, linears = grids_of(subject, steps, plan), {}
    if format == "gguf":
        from qlib.stream import gguf

        gguf.check(subject, grids)
        return {}
    if not grids:
        raise UserError(f"{format}: no pass of the recipe puts weights on a grid; allowed: packed, dense, gguf")
    for name, module in subject.model.named_modules():  # in this order they are named, as when the whole model is saved
        if isinstance(module, nn.Linear):
            linears[name] = module
    held = {name: Sketch(grids[name], one.in_features, one.out_features) for name, one in linears.items() if name in grids}
    return import_module(f"qlib.export.{format}").quantization_config(held, [name for name in linears if name not in held])


def grids_of(subject: Subject, steps: list[Step], plan: dict[str, dict[str, Any]]) -> dict[str, Grid]:
    """The grid that every linear of the blocks will be on, by its path; empty if the recipe puts them on none."""
    rounding = next((options for _, options in steps if hasattr(options, "grid")), None)
    if rounding is None:
        return {}
    where = family_of(subject.config).blocks
    paths = (f"{where}.{i}.{name}" for i, one in enumerate(blocks_of(subject.model)) for name in linears_of(subject.model, one))
    known = rounding.__dataclass_fields__
    chosen = {path: {key: value for key, value in plan.get(path, {}).items() if key in known} for path in paths}
    return {path: replace(rounding, **own).grid for path, own in chosen.items()}


def check_scales(subject: Subject, stored: Stored, steps: list[Step], format: str, seed: int) -> None:
    """Refuse weights that take scales which the format cannot hold: one look at all of them, minutes instead of hours.

    The scales are those of the weights as they are. Passes that move weights, or cut ranges, may still end at others.

    Raises:
        UserError: names file, tensor and scale; or a tensor that cannot be read.
    """
    if format not in HALF:
        return
    plan = _early_plan(subject, steps, seed)
    grids = [(path, grid) for path, grid in grids_of(subject, steps, plan).items() if grid.element == "int"]
    stored.expect([f"{path}.weight" for path, _ in grids])
    for index in progress(0, len(grids), "looking at scales"):
        path, grid = grids[index]
        name = f"{path}.weight"
        scales = fit_grid(stored.read(name)[name], grid).scales.float()
        if len(wrong := scales[scales.half().float() != scales]):
            raise UserError(
                f"{stored.entries[stored.names[name]].file}: tensor '{name}' needs a scale of {wrong[0].item():.3g}, which "
                f"fp16, the type of scales in {format}, cannot hold; use format compressed_tensors"
            )


def block_tensors(subject: Subject, index: int, format: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What a checkpoint holds of a block, by name, and what that adds to the manifest's entry.

    All other blocks lie on the meta device.

    Raises:
        UserError: a weight that the format cannot hold.
    """
    if format == "packed":
        tensors, entry = checkpoint_tensors(subject.model)
        return in_order(tensors), entry
    if format == "gguf":
        from qlib.stream import gguf

        return gguf.block_tensors(subject, index)
    path, block = f"{family_of(subject.config).blocks}.{index}", blocks_of(subject.model)[index]
    tensors = {f"{path}.{name}": parameter.detach() for name, parameter in block.named_parameters()}
    for name, layer in block.named_modules():
        if isinstance(layer, PackedLinear):
            tensors |= {f"{path}.{name}.{key}": value for key, value in _layer_tensors(layer, f"{path}.{name}", format).items()}
    return in_order(tensors), {}


def end_tensors(
    names: list[str], stored: Stored, config: Any, format: str
) -> tuple[Layout, Iterable[torch.Tensor], dict[str, Any]]:
    """Layout, contents piece by piece, and entry, of embedding, norm or head."""
    if format == "gguf":
        from qlib.stream import gguf

        return gguf.end_tensors(names, stored, config)
    layout = {name: stored.layout(name) for name in sorted(names)}
    return layout, (piece for name in layout for piece in stored.pieces(name)), {}


def _layer_tensors(layer: PackedLinear, path: str, format: str) -> dict[str, torch.Tensor]:
    """What stands in the place of a linear's weight."""
    if format == "dense":
        return {"weight": layer.effective_weight().bfloat16()}
    try:
        return import_module(f"qlib.export.{format}").layer_tensors(layer.compressed())
    except UserError as error:
        raise UserError(f"{path}: {error}; begin anew with format compressed_tensors") from None


def write_beside(subject: Subject, folder: Path, entry: dict[str, Any], format: str, work: Path) -> None:
    """Write what lies beside the weights; config.json, without which nothing loads, last.

    Raises:
        OSError: it cannot be written.
    """
    if entry and (name := getattr(import_module(f"qlib.export.{format}"), "CONFIG_FILE", None)):
        write_json(folder / name, entry, work, indent=2)
    try:
        write_rest(subject, folder, entry)
    except Exception as error:  # of no other type is what tokenizers raises where it cannot write
        if (code := re.search(r"\(os error (\d+)\)$", str(error))) is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from None
