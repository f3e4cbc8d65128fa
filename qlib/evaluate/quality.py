"""The one scorer: token ids in, logits out. torch and numpy only, so that it runs inside every tool's environment."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from qlib.evaluate.items import Item

__all__ = ["Logits", "SCORER", "score_windows", "score_items", "log_probabilities", "WindowScores"]

#: Maps token ids `[rows, tokens]` and a count to the logits of that many last positions `[rows, count, vocabulary]`.
#:
#: It may offer more, a method ``branches(contexts [rows, c], options [rows, n, t])`` that runs a context once for the n
#: texts that go on from it: logits that predict the first token of all of them `[rows, vocabulary]`, and those that
#: predict their other tokens `[rows, n, t - 1, vocabulary]`; or None where it cannot do that for these lengths.
Logits = Callable[[torch.Tensor, int], torch.Tensor]

#: Raised whenever figures change, were it in their last bits: answers that were kept are computed again.
SCORER = 2
#: Tokens that run together. More would be slower on a CPU: what one layer hands to the next no longer fits its caches.
BATCH_TOKENS = 2048


@dataclass(frozen=True)
class WindowScores:
    """Sums per window: negative log-likelihood in nats, and scored tokens. `[windows]` each."""

    nll: np.ndarray
    tokens: np.ndarray


def _nll(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of `tokens [...]` under `logits [..., vocabulary]`, in fp32."""
    flat = F.cross_entropy(logits.flatten(0, -2).float(), tokens.flatten().to(logits.device), reduction="none")
    return flat.view(tokens.shape)


def _batches(numbers: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """`numbers` in runs of as many as make a batch when each stands for so many tokens."""
    step = max(BATCH_TOKENS // max(tokens, 1), 1)
    return (list(numbers[at : at + step]) for at in range(0, len(numbers), step))


def _alike(shapes: Iterable) -> dict:
    """Numbers of the entries of each shape, in a fixed order: what has the same shape runs together, unpadded."""
    groups = defaultdict(list)
    for number, shape in enumerate(shapes):
        groups[shape].append(number)
    return dict(sorted(groups.items(), reverse=True))


@torch.inference_mode()
def score_windows(logits_of: Logits, windows: Sequence[Sequence[int]], start: int) -> WindowScores:
    """Negative log-likelihood of windows of text. Each stands behind the start token, and all its tokens count."""
    nll, tokens = np.zeros(len(windows)), np.array([len(window) for window in windows], dtype=np.int64)
    # Few windows are shorter than the rest. Padding stands at the end, where a causal model cannot see it.
    order = sorted(range(len(windows)), key=lambda i: (-len(windows[i]), i))
    for picked in _batches(order, int(tokens.max(initial=1))):
        ids = torch.full((len(picked), 1 + len(windows[picked[0]])), start)
        for row, number in enumerate(picked):
            ids[row, 1 : 1 + len(windows[number])] = torch.tensor(windows[number])
        scores = _nll(logits_of(ids[:, :-1], ids.shape[1] - 1), ids[:, 1:]).double().cpu().numpy()
        for row, number in enumerate(picked):
            nll[number] = scores[row, : tokens[number]].sum()
    return WindowScores(nll, tokens)


@torch.inference_mode()
def score_items(logits_of: Logits, items: Sequence[Item], start: int) -> tuple[np.ndarray, np.ndarray]:
    """Log-likelihood of every option behind its context, and behind the start token alone: `[items, options]` each."""
    inside = _score_branches(logits_of, items, start)
    if inside is None:
        pairs = [((start, *item.context), option) for item in items for option in item.options]
        inside = _score_ends(logits_of, pairs).reshape(len(items), -1)
    options = [option for item in items for option in item.options]
    distinct = {option: number for number, option in enumerate(dict.fromkeys(options))}
    alone = _score_ends(logits_of, [((start,), option) for option in distinct])
    return inside, alone[[distinct[option] for option in options]].reshape(len(items), -1)


def _score_branches(logits_of: Logits, items: Sequence[Item], start: int) -> np.ndarray | None:
    """Log-likelihood of each option behind its context, which is run once `[items, options]`; None: impossible."""
    branches = getattr(logits_of, "branches", None)
    shapes = _alike((len(item.context), *map(len, item.options)) for item in items)
    if branches is None or any(len(set(lengths)) > 1 for _, *lengths in shapes):
        return None
    sums = np.zeros((len(items), len(items[0].options)))
    for (head, *lengths), numbers in shapes.items():
        for picked in _batches(numbers, 1 + head + sum(lengths)):
            contexts = torch.tensor([(start, *items[i].context) for i in picked])
            options = torch.tensor([items[i].options for i in picked])
            found = branches(contexts, options)
            if found is None:
                return None
            first, rest = found
            logs = first.float().log_softmax(-1).gather(-1, options[..., 0].to(first.device))
            sums[picked] = (logs.double() - _nll(rest, options[..., 1:]).double().sum(-1)).cpu().numpy()
    return sums


def _score_ends(logits_of: Logits, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> np.ndarray:
    """Log-likelihood of each end behind its beginning: `[pairs]`."""
    sums = np.zeros(len(pairs))
    for (head, tail), numbers in _alike((len(head), len(tail)) for head, tail in pairs).items():
        for picked in _batches(numbers, head + tail):
            ids = torch.tensor([(*pairs[i][0], *pairs[i][1]) for i in picked])
            sums[picked] = -_nll(logits_of(ids[:, :-1], tail), ids[:, head:]).double().sum(-1).cpu().numpy()
    return sums


@torch.inference_mode()
def log_probabilities(logits_of: Logits, windows: Sequence[Sequence[int]], start: int) -> Iterator[torch.Tensor]:
    """Log-probabilities `[tokens, vocabulary]` in fp32 that predict each token of each window, window by window."""
    for window in windows:
        ids = torch.tensor([[start, *window[:-1]]], dtype=torch.long)
        yield logits_of(ids, len(window))[0].float().log_softmax(-1)
