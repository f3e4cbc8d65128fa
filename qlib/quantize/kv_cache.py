"""A key-value cache of 8 or 4 bits: for long contexts it, and not the weights, is what fills the memory.

No weight changes. The setting goes into the model's configuration and is saved with it; `qlib.layers.kv_cache` holds
the codes, and the scorer reads through it, so that quality describes the model as it generates.
"""

from dataclasses import dataclass
from typing import Any, Literal

from qlib.errors import UserError
from qlib.models.families import blocks_of
from qlib.models.load import Subject
from qlib.recipe import Context

__all__ = ["Options", "SCOPE", "apply", "check"]

SCOPE = "model"


@dataclass(frozen=True)
class Options:
    """Options of a quantized key-value cache.

    Args:
        bits: width of a code.
        group_size: channels of a head that share a scale and a zero; null: all of the head.
    """

    bits: Literal[8, 4] = 8
    group_size: Literal[32, 64] | None = None

    def __post_init__(self) -> None:
        if self.bits not in (8, 4):
            raise UserError(f"bits: {self.bits} is not allowed; allowed: 8, 4")


def check(subject: Subject, options: Options) -> None:
    """Refuse group sizes that do not divide a head."""
    width = blocks_of(subject.model)[0].self_attn.head_dim
    if options.group_size and width % options.group_size:
        fit = [str(size) for size in (32, 64) if width % size == 0]
        raise UserError(
            f"group_size: {options.group_size} does not divide the {width} channels of a head; "
            f"allowed here: {', '.join([*fit, 'null'])}"
        )


def apply(subject: Subject, options: Options, context: Context) -> Subject:
    """Ask for the cache in the model's configuration, in place."""
    settings: dict[str, Any] = {"bits": options.bits, "group_size": options.group_size}
    subject.model.config.kv_cache = settings
    subject.config.kv_cache = settings
    return subject
