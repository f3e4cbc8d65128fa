"""The one scorer: token ids in, logits out. torch and numpy only, so that it runs inside every tool's environment."""

from dataclasses import dataclass
from itertools import groupby
from typing import Callable, Iterator, Sequence

import numpy as np
import torch

from qlib.evaluate.items import Item

__all__ = ["Logits", "score_windows", "score_items", "log_probabilities", "WindowScores"]

#: Maps token ids `[rows, tokens]` and a count to the logits of that many last positions `[rows, count, vocabulary]`.
Logits = Callable[[torch.Tensor, int], torch.Tensor]
BATCH_TOKENS = 8192


@dataclass(frozen=True)
class WindowScores:
    """Sums per window: negative log-likelihood in nats, and scored tokens. `[windows]` each."""

    nll: np.ndarray
    tokens: np.ndarray


def _padded(rows: Sequence[Sequence[int]], pad: int) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Group rows of similar length into padded batches: (indices, ids `[rows, longest]`).

    The order depends on the rows alone, so every strategy is scored in the same batches. Padding stands at the end,
    where a causal model cannot see it.
    """
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), i))
    while order:
        longest = len(rows[order[-1]])
        take = max(BATCH_TOKENS // longest, 1)
        picked, order = order[-take:], order[:-take]
        ids = torch.full((len(picked), longest), pad, dtype=torch.long)
        for row, index in enumerate(picked):
            ids[row, : len(rows[index])] = torch.tensor(rows[index], dtype=torch.long)
        yield picked, ids


@torch.inference_mode()
def score_windows(logits_of: Logits, windows: Sequence[Sequence[int]], start: int) -> WindowScores:
    """Negative log-likelihood of windows of text. Each stands behind the start token, and all its tokens count."""
    nll, tokens = np.zeros(len(windows)), np.zeros(len(windows), dtype=np.int64)
    rows = [[start, *window] for window in windows]
    for picked, ids in _padded(rows, start):
        logits = logits_of(ids, ids.shape[1])[:, :-1].float()
        scores = logits.gather(-1, ids[:, 1:, None].to(logits.device))[..., 0] - logits.logsumexp(-1)
        scores = scores.double().cpu().numpy()
        for row, index in enumerate(picked):
            tokens[index] = len(windows[index])
            nll[index] = -scores[row, : tokens[index]].sum()
    return WindowScores(nll, tokens)


@torch.inference_mode()
def score_items(logits_of: Logits, items: Sequence[Item], start: int) -> tuple[np.ndarray, np.ndarray]:
    """Log-likelihood of every option behind its context, and behind the start token alone: `[items, options]` each."""
    options = [(item, option) for item in items for option in item.options]
    inside = _score_ends(logits_of, [([start, *item.context], option) for item, option in options])
    alone = _score_ends(logits_of, [([start], option) for _, option in options])
    return inside.reshape(len(items), -1), alone.reshape(len(items), -1)


def _score_ends(logits_of: Logits, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> np.ndarray:
    """Log-likelihood of each end behind its beginning: `[pairs]`. Pairs of equal lengths share batches, unpadded."""
    sums = np.zeros(len(pairs))
    order = sorted(range(len(pairs)), key=lambda i: (len(pairs[i][0]), len(pairs[i][1])))
    for (head, tail), same in groupby(order, key=lambda i: (len(pairs[i][0]), len(pairs[i][1]))):
        indices = list(same)
        step = max(BATCH_TOKENS // (head + tail), 1)
        for at in range(0, len(indices), step):
            picked = indices[at : at + step]
            ids = torch.tensor([[*pairs[i][0], *pairs[i][1]] for i in picked])
            logits = logits_of(ids, tail + 1)[:, :-1].float()
            scores = logits.gather(-1, ids[:, head:, None].to(logits.device))[..., 0] - logits.logsumexp(-1)
            sums[picked] = scores.double().sum(-1).cpu().numpy()
    return sums


@torch.inference_mode()
def log_probabilities(logits_of: Logits, windows: Sequence[Sequence[int]], start: int) -> Iterator[torch.Tensor]:
    """Log-probabilities `[tokens, vocabulary]` in fp32 that predict each token of each window, window by window."""
    for window in windows:
        ids = torch.tensor([[start, *window[:-1]]], dtype=torch.long)
        yield logits_of(ids, len(window))[0].float().log_softmax(-1)
