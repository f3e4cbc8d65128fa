"""What a recipe leaves of a model: which linear is held how, as far as that is known before any weight is looked at."""

from copy import copy
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any, Callable

from qlib.models.families import blocks_of, family_of
from qlib.predict.anatomy import Anatomy, anatomy_of
from qlib.prune.select import read_pattern
from qlib.prune.width import head_dim_of, narrowed_config
from qlib.quantize.allocate_bits import format_at
from qlib.quantize.formats import Grid
from qlib.quantize.gptq import BLOCK
from qlib.quantize.keep_ends import wide_blocks
from qlib.recipe import pass_name

__all__ = ["Held", "Outcome", "start", "after"]


@dataclass(frozen=True)
class Held:
    """How a linear is held.

    Attributes:
        grid: None: bf16. stayed: weights that are not 0; None where none was pruned.
        rank: of an adapter beside the codes; 0: there is none.
    """

    grid: Grid | None = None
    stayed: int | None = None
    rank: int = 0


@dataclass(frozen=True)
class Outcome:
    """A model after some passes.

    Attributes:
        held: for each block, linear -> how it is held. planned: the same of options that a plan pass has left.
        ends: which of embedding and head are in 8 bits. cache: bits and group of the key-value cache; None: bf16.
        bound: why bytes on disk are only an upper bound; empty: they are exact.
        unknown: why not even that is known; empty: it is.
    """

    anatomy: Anatomy
    held: tuple[dict[str, Held], ...]
    planned: tuple[dict[str, Any], ...] = ()
    ends: frozenset[str] = field(default_factory=frozenset)
    cache: tuple[int, int | None] | None = None
    bound: str = ""
    unknown: str = ""


def start(anatomy: Anatomy) -> Outcome:
    """The model as it is: all in bf16."""
    return Outcome(anatomy, tuple({name: Held() for name in anatomy.linears} for _ in range(anatomy.layers)))


def after(outcome: Outcome, module: ModuleType, options: Any) -> Outcome:
    """What a pass makes of it."""
    name = pass_name(module)
    if name in EFFECTS:
        outcome = EFFECTS[name](outcome, options)
    if hasattr(module, "PRUNES"):
        outcome = _pruned(outcome, name, options)
    return _rounded(outcome, options) if hasattr(options, "grid") else outcome


def _rounded(outcome: Outcome, options: Any) -> Outcome:
    """All linears on the grid of the options, or of those that were planned."""
    plans = outcome.planned or ({},) * len(outcome.held)
    grids = [replace(options, **plan).grid if plan else options.grid for plan in plans]
    held = tuple({name: replace(one, grid=grid) for name, one in block.items()} for block, grid in zip(outcome.held, grids))
    masked = any(one.stayed is not None for block in held for one in block.values())
    bound = "what rounds to 0 is not stored" if masked else outcome.bound
    return replace(outcome, held=held, bound=bound)


def _pruned(outcome: Outcome, name: str, options: Any) -> Outcome:
    """Linears of which a share of the weights is gone."""
    held, again = [], False
    for block in outcome.held:
        held.append({})
        for linear, one in block.items():
            stayed = survivors(outcome.anatomy.linears[linear], name, options)
            again |= one.stayed is not None
            held[-1][linear] = replace(one, stayed=stayed if one.stayed is None else min(stayed, one.stayed))
    return replace(outcome, held=tuple(held), bound="pruned more than once" if again else outcome.bound)


def survivors(shape: tuple[int, int], name: str, options: Any) -> int:
    """How many weights of a linear `[out, in]` a pruning pass leaves; shares are rounded where weights are compared."""
    rows, width = shape
    if options.pattern:
        kept, of = read_pattern(options.pattern)
        return rows * width * kept // of
    if name == "wanda" and options.compare == "output":
        parts = [width] * rows
    elif name in ("sparsegpt", "joint"):
        parts = [rows * min(BLOCK, width - start) for start in range(0, width, BLOCK)]
    else:
        parts = [rows * width]
    return sum(part - round(options.sparsity * part) for part in parts)


def _narrow(outcome: Outcome, options: Any) -> Outcome:
    model, config = outcome.anatomy.model, outcome.anatomy.config
    return start(anatomy_of(narrowed_config(config, head_dim_of(model), options)))


def _shorten(outcome: Outcome, options: Any) -> Outcome:
    config = copy(outcome.anatomy.config)
    config.num_hidden_layers = round(options.keep_layers * config.num_hidden_layers)
    if getattr(config, "layer_types", None):
        config.layer_types = list(config.layer_types)[: config.num_hidden_layers]
    return start(anatomy_of(config))


def _untie(outcome: Outcome, options: Any) -> Outcome:
    """A head that shared the embedding's weight gets its own."""
    config = copy(outcome.anatomy.config)
    config.tie_word_embeddings = False
    return replace(outcome, anatomy=anatomy_of(config))


def _keep_ends(outcome: Outcome, options: Any) -> Outcome:
    layers = outcome.anatomy.layers
    wide = wide_blocks([outcome.anatomy.linear_weights] * layers, options)
    widths = [options.high if index in wide else options.low for index in range(layers)]
    return replace(outcome, planned=tuple(format_at(width, options.group_size) for width in widths))


def _pack_ends(outcome: Outcome, options: Any) -> Outcome:
    which = {"both": {"embedding", "head"}}.get(options.which, {options.which})
    return replace(outcome, ends=frozenset(which))


def _quantize_cache(outcome: Outcome, options: Any) -> Outcome:
    return replace(outcome, cache=(options.bits, options.group_size))


def _adapt(outcome: Outcome, options: Any) -> Outcome:
    """Adapters that stay beside the codes."""
    if options.train != "lora" or options.merge:
        return outcome
    ends = options.targets and tuple(options.targets)
    return replace(
        outcome,
        held=tuple(
            {name: replace(one, rank=options.rank) if not ends or name.endswith(ends) else one for name, one in block.items()}
            for block in outcome.held
        ),
    )


def _chosen(what: str) -> Callable[[Outcome, Any], Outcome]:
    return lambda outcome, options: replace(outcome, unknown=f"{what} are chosen by measuring")


def _shared(outcome: Outcome, options: Any) -> Outcome:
    return replace(outcome, bound="shares of linears are chosen by measuring")


#: What passes do beyond what their options (`grid`) and constants (`PRUNES`) say.
EFFECTS: dict[str, Callable[[Outcome, Any], Outcome]] = {
    "width": _narrow, "depth": _shorten, "rotate": _untie, "keep_ends": _keep_ends, "ends": _pack_ends,
    "kv_cache": _quantize_cache, "finetune": _adapt, "allocate_bits": _chosen("bits"), "tool": _chosen("formats"),
    "allocate_sparsity": _shared,
}  # fmt: skip
