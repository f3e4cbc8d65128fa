"""Embedding and head in 8 bits: of a small model they are most of what is left when its linears have 4.

Every row, one token of the vocabulary, is rounded to nearest with a scale of its own. A head that shares the
embedding's weight goes on sharing: one copy of codes serves the lookup of rows and the product with all of them.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from qlib.errors import UserError
from qlib.layers import pack
from qlib.layers.embedding import PackedEmbedding
from qlib.models.families import is_tied
from qlib.models.load import Subject
from qlib.models.packed import share_codes
from qlib.quantize.grid import CompressedWeight, Grid, fit_grid, round_to_grid
from qlib.recipe import Context

__all__ = ["Options", "SCOPE", "PACKS", "apply", "check"]

SCOPE = "model"
PACKS = True
GRID = Grid(8, None, symmetric=True)
ROWS = 4096  # that are rounded at a time: a whole vocabulary in fp32 takes twice the memory of the model's


@dataclass(frozen=True)
class Options:
    """Options of an 8-bit embedding and head.

    Args:
        which: which of the two; only both where the head shares the embedding's weight.
    """

    which: Literal["both", "embedding", "head"] = "both"


def check(subject: Subject, options: Options) -> None:
    """Refuse to tear apart what is shared, and to round twice."""
    embedding, head = subject.model.get_input_embeddings(), subject.model.get_output_embeddings()
    if options.which != "both" and is_tied(subject.model):
        raise UserError(f"which: {options.which} is not allowed where head and embedding are one; allowed: both")
    if not (hasattr(embedding, "weight") and hasattr(head, "weight")):
        raise UserError("pass: 'ends' finds the embedding or the head in 8 bits already")


@torch.no_grad()
def apply(subject: Subject, options: Options, context: Context) -> Subject:
    """Put packed modules into the places of embedding and head."""
    check(subject, options)
    model, tied = subject.model, is_tied(subject.model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if options.which != "head":
        model.set_input_embeddings(PackedEmbedding(_round(embedding.weight)))
    if tied:
        share_codes(model)
    elif options.which != "embedding":
        model.set_output_embeddings(pack(head, _round(head.weight)))
    return subject


def _round(weight: torch.Tensor) -> CompressedWeight:
    """Round rows to nearest, some at a time."""
    parts = [round_to_grid(rows, GRID, *fit_grid(rows, GRID)) for rows in weight.split(ROWS)]
    fields = ([getattr(part, name) for part in parts] for name in ("codes", "scales", "zeros"))
    return CompressedWeight(GRID, *map(torch.cat, fields))
