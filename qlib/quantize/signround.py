"""SignRound (Cheng et al. 2023, arXiv:2309.05516): learn for a whole block which weights to round up and which down.

Every weight gets an offset of at most half a step that is added before it is rounded, and every group two factors that
cut its range. They follow the sign of their gradient of the squared error between what the block makes of the inputs it
will get and what it made of exact ones in the uncompressed model; how far they go shrinks linearly to nothing.
"""

from dataclasses import dataclass, field
from typing import Any, Callable

import torch
from torch import nn
from torch.func import functional_call

from qlib.errors import UserError
from qlib.layers import pack
from qlib.prune.mask import mask_of
from qlib.quantize.formats import GridOptions
from qlib.plain_attention import PlainAttention
from qlib.quantize.rounding import Rounding
from qlib.recipe import BlockContext

__all__ = ["Options", "SCOPE", "check", "apply", "learn"]

SCOPE = "block"
CALIBRATES = True
TARGETS = True

CANDIDATES = 2  # iterates that are compared on all calibration text, beside the start
REACH = 0.5  # of an offset, in steps


@dataclass(frozen=True)
class Options(GridOptions):
    """Options of a rounding optimisation, beside those of every grid.

    Args:
        iterations: steps for each block.
        batch: calibration windows of a step.
        rate: how far a step moves offsets and range factors at first; null: 1 / iterations.
    """

    iterations: int = field(default=200, metadata={"minimum": 1})
    batch: int = field(default=8, metadata={"minimum": 1})
    rate: float | None = field(default=None, metadata={"minimum": 0})


def check(subject: Any, options: Options) -> None:
    """Refuse what is not learned here.

    Raises:
        UserError: one line that begins with the option's name.
    """
    if options.element != "int":
        raise UserError(f"element: {options.element} is not allowed with signround; allowed: int")
    if options.activations:
        raise UserError(f"activations: {options.activations} is not allowed with signround; allowed: null")
    if options.clip != "none":
        raise UserError(f"clip: {options.clip} is not allowed with signround, which learns its ranges; allowed: none")
    for name in ("iterations", "batch"):
        if getattr(options, name) < 1:
            raise UserError(f"{name}: {getattr(options, name)} is not allowed; allowed: at least 1")
    if options.rate is not None and options.rate <= 0:
        raise UserError(f"rate: {options.rate} is not allowed; allowed: more than 0, or null")


def apply(block: nn.Module, options: Options, context: BlockContext) -> None:
    """Replace the linears of `block` by packed ones whose rounding was learned.

    Of some iterates and the start, the one is kept that is best on all calibration text.
    """
    found = {}
    for name in (name for names in context.groups for name in names):
        linear = block.get_submodule(name)
        found[name] = Rounding(linear.weight, context.rounding[name].grid, mask_of(linear))
    learn(found, _Windows(block, context), options, context.seed * 1_000_003 + context.index)
    for name, rounding in found.items():
        parent, _, leaf = name.rpartition(".")
        setattr(block.get_submodule(parent), leaf, pack(block.get_submodule(name), rounding.compressed()))


class _Windows:
    """Calibration windows of a block: the loss of a few of them under rounded weights."""

    def __init__(self, block: nn.Module, context: BlockContext) -> None:
        self.block = block
        self.inputs = torch.cat([hidden for hidden, _ in context.inputs])  # [windows, tokens, hidden]
        self.targets = torch.cat(context.targets)
        self.arguments = {name: _one_row(value) for name, value in context.inputs[0][1].items()}

    def __len__(self) -> int:
        return len(self.inputs)

    def loss(self, weights: dict[str, torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
        """Mean squared error of the block's outputs."""
        with PlainAttention():
            out = functional_call(self.block, weights, (self.inputs[rows],), self.arguments)
        out = out[0] if isinstance(out, tuple) else out
        return (out.float() - self.targets[rows].float()).square().mean()


def _one_row(value: Any) -> Any:
    """Positions, rotations and masks are the same for all windows, which are full: keep one row of them."""
    if isinstance(value, tuple):
        return tuple(_one_row(one) for one in value)
    return value[:1] if isinstance(value, torch.Tensor) and value.ndim > 1 else value


def learn(found: dict[str, Rounding], windows: _Windows, options: Options, seed: int) -> list[float]:
    """Learn all roundings of a block in place; returns the losses of the iterates that were compared."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for rounding in found.values() for p in rounding.learned]
    offsets = [rounding.learned[0] for rounding in found.values()]
    factors = [p for rounding in found.values() for p in rounding.learned[1:]]
    rate = options.rate or 1 / options.iterations

    def weights() -> dict[str, torch.Tensor]:
        return {f"{name}.weight": rounding.quantized() for name, rounding in found.items()}

    losses, best = [_whole_loss(windows, weights, options.batch)], [p.detach().clone() for p in parameters]
    stops = {round(options.iterations * (i + 1) / CANDIDATES) for i in range(CANDIDATES)}
    order = torch.empty(0, dtype=torch.long)
    for step in range(options.iterations):
        if len(order) < min(options.batch, len(windows)):
            order = torch.randperm(len(windows), generator=generator)
        rows, order = order[: options.batch], order[options.batch :]
        gradients = torch.autograd.grad(windows.loss(weights(), rows), parameters)
        with torch.no_grad():
            moves = torch._foreach_sign(gradients)
            torch._foreach_add_(parameters, moves, alpha=-rate * (1 - step / options.iterations))
            torch._foreach_clamp_min_(offsets, -REACH)
            torch._foreach_clamp_max_(offsets, REACH)
            torch._foreach_clamp_min_(factors, 0.0)
            torch._foreach_clamp_max_(factors, 1.0)
        if step + 1 in stops:
            losses.append(_whole_loss(windows, weights, options.batch))
            if losses[-1] < min(losses[:-1]):
                best = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        torch._foreach_copy_(parameters, best)
    return losses


@torch.no_grad()
def _whole_loss(windows: _Windows, weights: Callable[[], dict[str, torch.Tensor]], batch: int) -> float:
    """Mean squared error over all windows."""
    now = weights()
    parts = torch.arange(len(windows)).split(batch)
    return sum(windows.loss(now, rows).item() * len(rows) for rows in parts) / len(windows)
