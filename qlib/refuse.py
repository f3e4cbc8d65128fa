"""Refuse recipes that cannot work, in one line that names the step, before anything is changed or computed."""

from types import ModuleType
from typing import Any

from qlib.errors import UserError
from qlib.layers import packed_layers
from qlib.models.families import blocks_of, linears_of
from qlib.models.load import Subject
from qlib.quantize.formats import Grid
from qlib.recipe import pass_name

__all__ = ["check_recipe"]


def check_recipe(subject: Subject, steps: list[tuple[ModuleType, Any]]) -> None:
    """Hold every step against the steps before it and against the model.

    Passes say what they need by constants of their module: ``NEEDS_FLOAT`` (weights that are on no grid yet),
    ``NEEDS_WHOLE`` (weights of which none was pruned), ``PREPARES`` (a later pass with a grid), ``PLANS_SPARSITY`` (a later
    pass that prunes, without a pattern), ``PLAIN_INTEGERS`` (no other grid before it), ``needs_grid`` (told the options: a
    grid before it); and what they leave behind: ``PACKS``, ``PRUNES``. A grid in the options packs as well.

    Raises:
        UserError: the first thing that cannot work.
    """
    gridded = [pass_name(module) for module, options in steps if hasattr(options, "grid")]
    if len(gridded) > 1:
        raise UserError(f"recipe: passes {', '.join(gridded)} each put the weights on a grid; only one of them can")
    if gridded and any(packed_layers(block) for block in blocks_of(subject.model)):
        raise UserError(f"recipe: pass '{gridded[0]}' needs float weights, but the model is already packed")
    for index, (module, options) in enumerate(steps):
        where = f"recipe[{index}]"
        if reason := _out_of_order(subject, steps[:index], (module, options), steps[index + 1 :]):
            raise UserError(f"{where}: pass '{pass_name(module)}' {reason}")
        try:
            if hasattr(module, "check"):
                module.check(subject, options)
            if hasattr(options, "grid"):
                _check_groups(subject, options.grid)
        except UserError as error:
            raise UserError(f"{where}.{error}") from None


def _out_of_order(subject: Subject, before: list, step: tuple[ModuleType, Any], after: list) -> str:
    """Why a pass cannot stand where it stands; empty if it can."""
    module, options = step
    grids = [options.grid for _, options in before if hasattr(options, "grid")]
    packed = bool(grids or packed_layers(subject.model)) or any(hasattr(one, "PACKS") for one, _ in before)
    if packed and hasattr(module, "NEEDS_FLOAT"):
        return "must come before the weights are put on a grid"
    if not packed and hasattr(module, "needs_grid") and module.needs_grid(options):
        return "trains what lies beside codes, but no pass before it puts the weights on a grid, e.g. rtn"
    if hasattr(module, "NEEDS_WHOLE") and any(hasattr(one, "PRUNES") for one, _ in before):
        return "would fill what was pruned; it must come before pruning"
    if hasattr(module, "PREPARES") and not any(hasattr(options, "grid") for _, options in after):
        return "prepares for a grid, but none follows, e.g. rtn"
    pruning = [options for one, options in after if hasattr(one, "PRUNES") and hasattr(options, "sparsity")]
    if hasattr(module, "PLANS_SPARSITY") and not pruning:
        return "chooses how much of each linear goes, but no pass that prunes follows, e.g. wanda"
    if hasattr(module, "PLANS_SPARSITY") and any(options.pattern for options in pruning):
        return "chooses how much of each linear goes, but a later pass has a pattern, which says that itself"
    odd = [grid.name for grid in grids if grid.element != "int" or grid.real_zero or grid.activations]
    if hasattr(module, "PLAIN_INTEGERS") and odd:
        return f"works on plain integer grids, not on {odd[0]}"
    return ""


def _check_groups(subject: Subject, grid: Grid) -> None:
    for name, linear in linears_of(subject.model, blocks_of(subject.model)[0]).items():
        if isinstance(grid.group_size, int) and linear.in_features % grid.group_size:
            fit = [str(size) for size in (32, 64, 128) if linear.in_features % size == 0]
            raise UserError(
                f"group_size: {grid.group_size} does not divide the {linear.in_features} input channels of {name}; "
                f"allowed here: {', '.join([*fit, 'null'])}"
            )
