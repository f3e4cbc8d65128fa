"""Choose masks from scores: an exact number of weights goes, the lowest first, ties by their place."""

import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from qlib.errors import UserError
from qlib.models.families import blocks_of, linears_of
from qlib.prune.mask import misfit

__all__ = ["choose_mask", "drop_lowest", "read_pattern", "check_share", "check_sparsity"]

SLICE = 2**23  # scores among which the lowest are found at a time


def choose_mask(
    scores: torch.Tensor,
    sparsity: float,
    pattern: str | None = None,
    by_row: bool = False,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The mask `[out, in]`, true where a weight stays.

    Args:
        scores: not negative, `[out, in]`; the weights with the lowest go.
        sparsity: share that goes, rounded to whole weights; ignored where a pattern says it.
        pattern: "N:M" keeps N of every M consecutive inputs.
        by_row: compare the weights of an output with each other only; otherwise those of the whole matrix.
        mask: of an earlier pass. What it pruned stays pruned and counts; where it pruned more than is asked for, its
            zeros alone remain.

    Raises:
        UserError: the mask does not fit the scores, or M does not divide the inputs.
    """
    if mask is not None and mask.shape != scores.shape:
        raise UserError(misfit(mask, scores))
    if mask is not None:
        scores = scores.masked_fill(~mask, -1.0)
    if pattern:
        kept, of = read_pattern(pattern)
        if scores.shape[1] % of:
            raise UserError(f"pattern: '{pattern}' does not fit: {of} does not divide {scores.shape[1]} input channels")
        rows, count = scores.reshape(-1, of), of - kept
    else:
        rows = scores if by_row else scores.reshape(1, -1)
        count = round(sparsity * rows.shape[1])
    # Part by part: what finding the lowest takes beside the scores is several times as much memory.
    step = max(1, SLICE // rows.shape[1])
    chosen = torch.cat([drop_lowest(part, count) for part in rows.split(step)]).view_as(scores)
    return chosen if mask is None else chosen & mask


def drop_lowest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """False for the `count` lowest scores of each row `[rows, columns]`; of equal ones the first go."""
    if count == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    edge = _find_lowest(scores, count)
    stay = scores > edge
    if stay.sum() == len(scores) * (scores.shape[1] - count):
        return stay
    below, equal = scores < edge, scores == edge  # some weights are worth the same as the last that goes
    places = count - below.sum(-1, keepdim=True)
    return ~(below | (equal & (equal.cumsum(-1, dtype=torch.int32) <= places)))


def _find_lowest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The `count`-th lowest score of each row, `[rows, 1]`. On a CPU numpy finds it several times as fast as torch."""
    if scores.device.type != "cpu":
        return scores.kthvalue(count, dim=-1, keepdim=True).values
    exact = scores if scores.dtype == torch.float64 else scores.float()  # numpy knows no bf16
    parts = exact.contiguous().chunk(torch.get_num_threads())
    with ThreadPoolExecutor(len(parts)) as threads:
        found = threads.map(lambda part: np.partition(part.numpy(), count - 1, axis=-1)[:, count - 1, None].copy(), parts)
        return torch.cat([torch.from_numpy(part) for part in found])


def read_pattern(pattern: str) -> tuple[int, int]:
    """"2:4" -> (2, 4).

    Raises:
        UserError: not N:M with N from 1 to M.
    """
    found = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", pattern)
    if not found or int(found[1]) > int(found[2]):
        raise UserError(f"pattern: '{pattern}' is not allowed; allowed: N:M, to keep N of every M inputs, 1 <= N <= M")
    return int(found[1]), int(found[2])


def check_share(sparsity: float) -> None:
    """Refuse a share of weights that cannot go.

    Raises:
        UserError: names what is allowed.
    """
    if not 0 <= sparsity < 1:
        raise UserError(f"sparsity: {sparsity} is not allowed; allowed: at least 0, less than 1")


def check_sparsity(subject: Any, options: Any) -> None:
    """Refuse a share or pattern (options `sparsity`, `pattern`) that no mask of the subject's linears can have.

    Raises:
        UserError: names the field, its value and what is allowed.
    """
    if options.pattern is None:
        return
    kept, of = read_pattern(options.pattern)
    if abs(options.sparsity - (1 - kept / of)) > 1e-6:
        raise UserError(
            f"sparsity: {options.sparsity} contradicts pattern '{options.pattern}'; "
            f"allowed with it: {1 - kept / of:.6g}"
        )
    for name, linear in linears_of(subject.model, blocks_of(subject.model)[0]).items():
        if linear.in_features % of:
            raise UserError(
                f"pattern: '{options.pattern}' does not fit {name}: {of} does not divide its {linear.in_features} "
                f"input channels; allowed: an M that does"
            )
