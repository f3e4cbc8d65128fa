"""Mixed bits by rule of thumb: the first and the last blocks keep more. The guess that measuring has to beat.

Blocks near either end are often, not always, the ones that suffer most from rounding. Taken in turn from both ends, as
many get the greater width as the budget allows, all others the smaller one.
"""

from dataclasses import dataclass
from typing import Any, Literal

from qlib.errors import UserError
from qlib.models.families import blocks_of, family_of, linears_of
from qlib.models.load import Subject
from qlib.quantize.allocate_bits import check, format_at
from qlib.recipe import Context

__all__ = ["Options", "SCOPE", "NEEDS_FLOAT", "plan", "check", "streams", "wide_blocks"]

SCOPE = "plan"
NEEDS_FLOAT = True


@dataclass(frozen=True)
class Options:
    """Options of a bit allocation by position; a later pass that rounds weights follows it.

    Args:
        budget: average bits of a code over all weights of the compressible linears.
        low: width of the blocks in the middle.
        high: width of the first and last blocks. 8 bits take one symmetric scale per output channel.
        group_size: input channels that share a scale at widths below 8; null: one scale per output channel.
    """

    budget: float = 4.0
    low: Literal[2, 3, 4, 5, 6, 8] = 3
    high: Literal[2, 3, 4, 5, 6, 8] = 5
    group_size: Literal[32, 64, 128] | None = 128

    def __post_init__(self) -> None:
        if self.low >= self.high:
            raise UserError(f"high: {self.high} is not allowed; allowed: more bits than low, {self.low}")
        if not self.low <= self.budget <= self.high:
            raise UserError(f"budget: {self.budget:g} is not allowed; allowed: {self.low} to {self.high} bits")

    @property
    def bits(self) -> tuple[int, int]:
        """The widths to choose from, as in `allocate_bits`."""
        return self.low, self.high


def streams(options: Options) -> bool:
    """Whether it can plan for a model of which one block at a time is there: it looks at shapes alone."""
    return True


def plan(subject: Subject, options: Options, context: Context) -> dict[str, dict[str, Any]]:
    """Format of every linear by its path; `subject.details` gets `allocation`."""
    where, blocks = family_of(subject.model.config).blocks, blocks_of(subject.model)
    linears = [linears_of(subject.model, block) for block in blocks]
    sizes = [sum(linear.weight.numel() for linear in block.values()) for block in linears]
    wide = wide_blocks(sizes, options)
    chosen = {
        f"{where}.{index}.{name}": options.high if index in wide else options.low
        for index, block in enumerate(linears)
        for name in block
    }
    subject.details["allocation"] = chosen
    return {path: format_at(width, options.group_size) for path, width in chosen.items()}


def wide_blocks(sizes: list[int], options: Options) -> set[int]:
    """Numbers of the blocks that get the greater width; `sizes` are the weights of each block."""
    order = [index for pair in zip(range(len(sizes)), reversed(range(len(sizes)))) for index in pair][: len(sizes)]
    room = (options.budget - options.low) * sum(sizes) * (1 + 1e-12)
    wide: set[int] = set()
    for index in order:
        room -= (options.high - options.low) * sizes[index]
        if room < 0:
            break
        wide.add(index)
    return wide
