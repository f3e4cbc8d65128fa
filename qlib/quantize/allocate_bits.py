"""Mixed bits: give every linear the width at which the model as a whole loses least, under a budget of bits.

How much a width hurts is measured, not guessed: each linear alone is rounded to nearest at each width, and the
Kullback-Leibler divergence of the model's distribution from that of the unrounded model is averaged over the tokens of
calibration windows. The widths are then the exact optimum of a knapsack, see `qlib.quantize.knapsack`. Losses of
linears are added as if they did not interact: rounding two of them may cost more or less than the sum.
"""

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Iterator, Literal, Sequence

import numpy as np
import torch
from torch import nn

from qlib.errors import UserError
from qlib.evaluate.precision import in_float32
from qlib.models.families import blocks_of, family_of, linears_of
from qlib.models.load import Subject
from qlib.progress import progress
from qlib.quantize import rtn
from qlib.quantize.knapsack import allocate
from qlib.recipe import Context
from qlib.walk import Batch, first_inputs, run_block

__all__ = [
    "Options", "SCOPE", "CALIBRATES", "NEEDS_FLOAT", "plan", "check", "sensitivities", "format_at", "linears_by_path"
]  # fmt: skip

SCOPE = "plan"
CALIBRATES = True
NEEDS_FLOAT = True
WIDTHS = (2, 3, 4, 5, 6, 8)
CHUNK = 256  # tokens whose logits are formed at once: bounds memory, and is fastest where they fit the cache


@dataclass(frozen=True)
class Options:
    """Options of a bit allocation; a later pass that rounds weights follows it.

    Args:
        budget: average bits of a code over all weights of the compressible linears.
        bits: widths to choose from. 8 bits take one symmetric scale per output channel, which has a packed kernel.
        group_size: input channels that share a scale at widths below 8; null: one scale per output channel.
        samples: calibration windows that the sensitivity is measured on, at most those that there are.
    """

    budget: float = 5.0
    bits: list[int] = field(default_factory=lambda: [4, 8])
    group_size: Literal[32, 64, 128] | None = 128
    samples: int = field(default=32, metadata={"minimum": 1})

    def __post_init__(self) -> None:
        wrong = [width for width in self.bits if width not in WIDTHS or isinstance(width, bool)]
        if wrong:
            raise UserError(f"bits: {wrong[0]} is not allowed; allowed: widths out of {', '.join(map(str, WIDTHS))}")
        if not self.bits or len(set(self.bits)) < len(self.bits):
            what = "is given twice" if self.bits else "is empty"
            twice = f"{next(width for width in self.bits if self.bits.count(width) > 1)} " if self.bits else ""
            raise UserError(f"bits: {twice}{what}; allowed: a list of different widths, e.g. [4, 8]")
        if not min(self.bits) <= self.budget <= max(self.bits):
            limits = f"{min(self.bits)} to {max(self.bits)} bits"
            raise UserError(f"budget: {self.budget:g} is not allowed; allowed: {limits}")


def check(subject: Subject, options: Options) -> None:
    """Refuse group sizes that do not divide the input channels of a linear."""
    sizes = {format_at(width, options.group_size)["group_size"] for width in options.bits} - {None}
    for path, linear in linears_by_path(subject.model):
        for size in sizes:
            if linear.in_features % size:
                fit = [str(one) for one in (32, 64, 128) if linear.in_features % one == 0]
                allowed = ", ".join([*fit, "null"])
                raise UserError(
                    f"group_size: {size} does not divide the {linear.in_features} input channels of {path}; "
                    f"allowed here: {allowed}"
                )


def plan(subject: Subject, options: Options, context: Context) -> dict[str, dict[str, Any]]:
    """Format of every linear by its path; `subject.details` gets `sensitivity` and `allocation`.

    Raises:
        UserError: a group size does not divide the input channels of a linear.
    """
    check(subject, options)
    bits = sorted(options.bits)
    ids = list(torch.cat(context.ids)[: options.samples].split(len(context.ids[0])))
    paths, losses = sensitivities(subject.model, ids, [format_at(width, options.group_size) for width in bits])
    sizes = [linear.weight.numel() for _, linear in linears_by_path(subject.model)]
    chosen = allocate(losses, sizes, bits, options.budget)
    subject.details["sensitivity"] = [
        {"name": path, "bits": width, "kl": float(loss)}
        for path, row in zip(paths, losses)
        for width, loss in zip(bits, row)
    ]
    subject.details["allocation"] = dict(zip(paths, chosen))
    return {path: format_at(width, options.group_size) for path, width in zip(paths, chosen)}


def format_at(width: int, group_size: int | None) -> dict[str, Any]:
    """Options of a rounding pass at a width."""
    coarse = width == 8
    return {"bits": width, "group_size": None if coarse else group_size, "symmetric": coarse}


def linears_by_path(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Path and module of every compressible linear, in the order they run."""
    where = family_of(model.config).blocks
    return [
        (f"{where}.{index}.{name}", linear)
        for index, block in enumerate(blocks_of(model))
        for name, linear in linears_of(model, block).items()
    ]


@torch.no_grad()
def sensitivities(
    model: nn.Module, ids: list[torch.Tensor], formats: Sequence[dict[str, Any]]
) -> tuple[list[str], np.ndarray]:
    """What rounding one linear alone does to the model's distribution.

    Computed in fp32: bf16 activations alone move the distribution by more than rounding to 8 bits does. Blocks are
    cast one at a time, and those before the rounded linear run once: memory is bounded by one block, the hidden states
    of the windows and the distributions of `CHUNK` tokens.

    Args:
        ids: token ids `[rows, tokens]` of each batch.
        formats: options of `rtn` to round to.

    Returns:
        paths of the linears, and the mean divergence in nats per token `[linears, formats]`.
    """
    blocks, paths, losses = blocks_of(model), [], []
    with in_float32(model.get_submodule(family_of(model.config).embedding)):
        batches = first_inputs(model, ids)
    divergence = Divergence(model.get_output_embeddings(), _outputs(model, batches, 0))
    for index in progress(0, len(blocks), "sensitivity"):
        for name, linear in linears_of(model, blocks[index]).items():
            row = []
            for options in (rtn.Options(**one) for one in formats):
                with rounded(linear, options):
                    row.append(divergence(_outputs(model, batches, index)))
            losses.append(row)
            paths.append(f"{family_of(model.config).blocks}.{index}.{name}")
        batches = _through(blocks[index], batches)
    return paths, np.array(losses, dtype=np.float64)


@contextmanager
def rounded(linear: nn.Linear, options: rtn.Options) -> Iterator[None]:
    """Round the weight of `linear` for a while; the very tensor it had comes back, whatever happens."""
    original = linear.weight.data
    try:
        linear.weight.data = rtn.solve(original, options).dequantize()
        yield
    finally:
        linear.weight.data = original


def _through(block: nn.Module, batches: list[Batch]) -> list[Batch]:
    with in_float32(block):
        return run_block(block, batches)


def _outputs(model: nn.Module, batches: list[Batch], index: int) -> torch.Tensor:
    """Hidden states `[tokens, hidden]` behind the last norm, from the inputs of block `index`."""
    for block in blocks_of(model)[index:]:
        batches = _through(block, batches)
    norm = model.get_submodule(family_of(model.config).norm)
    with in_float32(norm):
        return torch.cat([norm(hidden).flatten(0, 1) for hidden, _ in batches])


class Divergence:
    """Mean divergence in nats of a changed model's distributions from those of the model as it is.

    With logits z = W h, the divergence of q from p is ``log sum exp(z_q) - log sum exp(z_p) - p . (z_q - z_p)``, and
    the last term is ``(p W) . (h_q - h_p)``: of the vocabulary only one sum has to be formed for each changed model.

    Args:
        head: maps hidden states to logits, without a bias.
        hidden: of the model as it is, `[tokens, hidden]`.
    """

    def __init__(self, head: nn.Linear, hidden: torch.Tensor):
        self.head, self.hidden = head, hidden
        with in_float32(head):
            parts = [head(part) for part in hidden.split(CHUNK)]
            self.expected = torch.cat([part.softmax(-1) @ head.weight for part in parts])  # [tokens, hidden]
            self.normalizer = torch.cat([part.logsumexp(-1) for part in parts])  # [tokens]

    def __call__(self, hidden: torch.Tensor) -> float:
        with in_float32(self.head):
            normalizer = torch.cat([self.head(part).logsumexp(-1) for part in hidden.split(CHUNK)])
        gain = (self.expected * (hidden - self.hidden)).sum(-1)
        return max((normalizer - self.normalizer - gain).double().mean().item(), 0.0)
