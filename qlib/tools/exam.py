"""Questions as token ids in one file: what is asked here can be answered in another environment, by the same scorer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qlib.data.source import read_documents
from qlib.data.tokenizer import cut_places, encode_once, start_token
from qlib.evaluate.items import Item, build_items, cut_windows

__all__ = ["Exam", "make_exam", "read_exam", "write_exam"]


@dataclass(frozen=True)
class Exam:
    """What a model is asked.

    Attributes:
        items: multiple-choice items. windows: (document, token ids) of each window of text.
        start: the token that stands before a text.
        documents: how many there are; items and windows name theirs by number.
    """

    items: list[Item]
    windows: list[tuple[int, list[int]]]
    start: int
    documents: int

    @property
    def texts(self) -> list[list[int]]:
        """The windows without their documents."""
        return [ids for _, ids in self.windows]


def make_exam(tokenizer: Any, evaluation: Any, split: str = "evaluation", seed: int = 0) -> Exam:
    """Items and windows as `qlib.evaluate` draws them.

    Args:
        evaluation: has ``text``, ``documents``, ``length`` and ``items``.
        split: of the text; choices are made on "development".

    Raises:
        UserError: the text is missing or too short.
    """
    documents = read_documents(evaluation.text, split)[: evaluation.documents]
    ids = encode_once(tokenizer, [document.text for document in documents])
    items = build_items(ids, cut_places(tokenizer), seed, evaluation.items)
    return Exam(items, cut_windows(ids, evaluation.length), start_token(tokenizer), len(documents))


def write_exam(exam: Exam, path: Path) -> None:
    """Write an exam as an npz file; ids of unequal length lie one behind the other."""
    parts = {"context": [item.context for item in exam.items], "text": exam.texts}
    parts["option"] = [option for item in exam.items for option in item.options]
    arrays = {"start": np.array(exam.start), "documents": np.array(exam.documents)}
    for name, rows in parts.items():
        arrays[f"{name}_ids"] = np.concatenate([np.asarray(row, np.int32) for row in rows])
        arrays[f"{name}_lengths"] = np.array([len(row) for row in rows])
    arrays["item_document"] = np.array([item.document for item in exam.items])
    arrays["item_level"] = np.array([item.level for item in exam.items])
    arrays["window_document"] = np.array([document for document, _ in exam.windows])
    np.savez(path, **arrays)


def read_exam(path: Path) -> Exam:
    """The inverse of `write_exam`."""
    with np.load(path, allow_pickle=False) as stored:
        rows = {
            name: [part.tolist() for part in np.split(stored[f"{name}_ids"], np.cumsum(stored[f"{name}_lengths"])[:-1])]
            for name in ("context", "option", "text")
        }
        where = zip(stored["item_document"].tolist(), stored["item_level"].tolist(), rows["context"])
        each = map(tuple, rows["option"])
        options = zip(*[each] * (len(rows["option"]) // len(rows["context"])))  # each item takes as many of the one
        items = [Item(document, level, tuple(context), own) for (document, level, context), own in zip(where, options)]
        windows = list(zip(stored["window_document"].tolist(), rows["text"]))
        return Exam(items, windows, int(stored["start"]), int(stored["documents"]))
