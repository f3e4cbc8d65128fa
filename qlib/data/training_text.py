"""Draw the text that a model is fine-tuned on: whole documents of the training split until the budget is reached."""

from functools import partial
from typing import Any, Callable, Iterator

import numpy as np

from qlib.data.corpus import TRAIN_ONLY, read_entry, split_entries
from qlib.data.source import read_documents
from qlib.data.tokenizer import encode_stream
from qlib.errors import UserError

__all__ = ["read_training", "check_budget", "held_out_windows"]

CHUNK = 32  # documents that are read and tokenized at a time
CHARACTERS = 8  # of a development document for each token of a window: more are not needed
SAMPLE = 32  # documents from which the length of the whole split is estimated


def read_training(tokenizer: Any, text: str, tokens: int, seed: Any) -> np.ndarray:
    """Token ids `[tokens]` of documents in random order, each behind the start token; the last one is cut.

    The order is a function of `seed`, an integer or a list of them; no more is read than the budget asks for. The
    packages of the reference corpus whose files differ between builds are left out.

    Raises:
        UserError: the split holds fewer tokens, or the text cannot be read.
    """
    parts, taken = [], 0
    for part in _encoded(tokenizer, text, seed):
        parts.append(part)
        taken += len(part)
        if taken >= tokens:
            return np.concatenate(parts)[:tokens]
    raise _too_much(tokens, taken, text, "")


def check_budget(tokenizer: Any, text: str, tokens: int) -> None:
    """Refuse a budget that is far beyond the split, estimated from a few documents; `read_training` counts exactly.

    Raises:
        UserError: as said, or the text cannot be read.
    """
    documents = len(_documents(text))
    sample = next(_encoded(tokenizer, text, 0, SAMPLE))
    estimate = round(len(sample) * documents / min(documents, SAMPLE))
    if tokens > 2 * estimate:
        raise _too_much(tokens, estimate, text, "about ")


def held_out_windows(tokenizer: Any, text: str, length: int, count: int) -> np.ndarray:
    """Ids `[<= count, length]` from the beginnings of development documents spread over the split, always the same.

    Where the split is very short, the windows are as long as it is.

    Raises:
        UserError: the text cannot be read.
    """
    documents = read_documents(text, "development")
    picks = np.unique(np.linspace(0, len(documents) - 1, count).round().astype(int))
    stream = encode_stream(tokenizer, [documents[index].text[: CHARACTERS * length] for index in picks])
    length = min(length, len(stream))
    windows = np.linspace(0, len(stream) // length - 1, count).round().astype(int)
    return stream[np.unique(windows)[:, None] * length + np.arange(length)].astype(np.int64)


def _documents(text: str) -> list[Callable[[], str]]:
    """A function for each document of the training split that reads it."""
    if text == "reference":
        entries = split_entries("train", without=TRAIN_ONLY)
        return [partial(lambda entry: read_entry(entry).text, entry) for entry in entries]
    return [partial(str, document.text) for document in read_documents(text, "train")]


def _encoded(tokenizer: Any, text: str, seed: Any, chunk: int = CHUNK) -> Iterator[np.ndarray]:
    """The split in random order, tokenized a few documents at a time."""
    documents = _documents(text)
    order = np.random.default_rng(seed).permutation(len(documents))
    for at in range(0, len(order), chunk):
        yield encode_stream(tokenizer, [documents[index]() for index in order[at : at + chunk]])


def _too_much(tokens: int, held: int, text: str, about: str) -> UserError:
    return UserError(
        f"tokens: {tokens} are more than the training split of '{text}' holds: {about}{held} tokens, so that would be "
        f"{tokens / max(held, 1):,.1f} epochs; allowed: at most one"
    )
