"""Rotate the residual stream: QuaRot (Ashkboos et al. 2024, arXiv:2404.00456); R1, R2 of SpinQuant (arXiv:2405.16406).

Whatever writes into the residual stream is multiplied by an orthogonal Q, whatever reads it by Q^T, and the model stays
the same: a root mean square norm does not see a rotation once its weight has moved into the linears that follow. A
Hadamard matrix with random signs spreads every outlier over all channels, in the activations and in the weights.
Everything is fused, nothing is added to what runs; only a head that shared the embedding's weight gets its own.
"""

from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from qlib.errors import UserError
from qlib.models.families import blocks_of, family_of, is_tied, linears_of
from qlib.models.load import Subject
from qlib.prune.mask import mask_of
from qlib.recipe import Context
from qlib.transforms.hadamard import Rotation, rotation

__all__ = ["Options", "SCOPE", "NEEDS_FLOAT", "check", "apply"]

SCOPE = "model"
NEEDS_FLOAT = True
NEEDS_WHOLE = True
#: Norms and the linears that read what they normalise; linears that write into the residual stream.
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
WRITERS = ("self_attn.o_proj", "mlp.down_proj")
#: Rows that are rotated at a time, so that no copy of a whole weight in float64 is made.
ROWS = 4096


@dataclass(frozen=True)
class Options:
    """Options of a rotation pass.

    Args:
        heads: rotate the values of every attention head as well, between v_proj and o_proj.
    """

    heads: bool = True


def check(subject: Subject, options: Options) -> None:
    """Refuse pruned models: a rotation mixes the zeros with the rest."""
    for block in blocks_of(subject.model):
        for name, linear in linears_of(subject.model, block).items():
            if mask_of(linear) is not None:
                raise UserError(f"pass: 'rotate' would fill the pruned weights of {name}; rotate before pruning")


@torch.no_grad()
def apply(subject: Subject, options: Options, context: Context) -> Subject:
    """Rotate the weights of `subject.model` in place; a tied head is untied, in the configurations too.

    Returns:
        the subject with its configuration; `rotation` in its details tells how the matrices were made.

    Raises:
        UserError: a weight was pruned.
    """
    check(subject, options)
    model, family = subject.model, family_of(subject.model.config)
    generator = torch.Generator().manual_seed(context.seed)
    stream = rotation(model.config.hidden_size, generator)
    made, config = {"stream": stream.name}, _untie(subject)
    _rotate(model.get_submodule(family.embedding).weight, stream)
    _read(model.get_submodule(family.norm), [model.get_submodule(family.head)], stream)
    for block in blocks_of(model):
        for norm, names in READERS.items():
            _read(block.get_submodule(norm), [block.get_submodule(name) for name in names], stream)
        for name in WRITERS:
            _write(block.get_submodule(name), stream)
        if options.heads:
            inner = rotation(block.self_attn.head_dim, generator)
            made["heads"] = inner.name
            _write(block.self_attn.v_proj, inner)
            _rotate(block.self_attn.o_proj.weight.unflatten(1, (-1, len(inner.signs))), inner)
    return replace(subject, config=config, details=subject.details | {"rotation": made})


def _untie(subject: Subject) -> Any:
    """Give a tied head a weight of its own, because only the head takes the last norm's weight; returns the config."""
    model, config = subject.model, deepcopy(subject.config)
    if is_tied(model):
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
        model.config.tie_word_embeddings = config.tie_word_embeddings = False
    return config


def _read(norm: nn.Module, linears: list[nn.Linear], stream: Rotation) -> None:
    """Move a norm's weight into the linears that read it, and let them read the rotated stream: W diag(g) Q."""
    for linear in linears:
        _rotate(linear.weight, stream, norm.weight.double())
    norm.weight.fill_(1)


def _write(linear: nn.Linear, inner: Rotation) -> None:
    """Rotate what a linear puts out, all of it or in pieces of the rotation's size (heads): Q^T W and Q^T b."""
    size = len(inner.signs)
    for piece in linear.weight.split(size):
        _rotate(piece.T, inner)
    if linear.bias is not None:
        _rotate(linear.bias.view(-1, size), inner)


def _rotate(rows: torch.Tensor, inner: Rotation, scale: torch.Tensor | float = 1.0) -> None:
    """Replace rows `[..., n]`, a view of whatever strides, by rows * scale @ Q: in float64, rounded once."""
    for part in rows.split(ROWS):
        part.copy_(inner(part.double() * scale))
