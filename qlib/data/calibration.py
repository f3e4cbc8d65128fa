"""Draw the token windows that data-dependent passes feed on."""

from typing import Any

import numpy as np
import torch

from qlib.data.source import read_documents
from qlib.data.tokenizer import encode_stream
from qlib.errors import UserError

__all__ = ["read_calibration"]


def read_calibration(tokenizer: Any, calibration: Any, seed: int, rows: int = 16) -> list[torch.Tensor]:
    """Random windows of the calibration split.

    Args:
        calibration: has ``text``, ``samples`` (windows) and ``length`` (tokens of each).
        rows: windows per batch.

    Returns:
        batches of token ids `[<= rows, length]`; the same seed draws the same windows.

    Raises:
        UserError: the split is shorter than what is asked for.
    """
    documents = read_documents(calibration.text, "calibration")
    texts = [document.text for document in documents]
    order = np.random.default_rng(seed).permutation(len(texts))
    needed = calibration.samples * calibration.length
    stream, taken = [], 0
    for at in range(0, len(order), 32):
        part = encode_stream(tokenizer, [texts[i] for i in order[at : at + 32]])
        stream.append(part)
        taken += len(part)
        if taken >= 2 * needed:
            break
    ids = np.concatenate(stream)
    windows = len(ids) // calibration.length
    if windows < calibration.samples:
        raise UserError(
            f"calibration.samples: {calibration.samples} windows of {calibration.length} tokens are more than the "
            f"{windows} that the calibration split of '{calibration.text}' holds"
        )
    starts = np.random.default_rng(seed).permutation(windows)[: calibration.samples] * calibration.length
    chosen = torch.from_numpy(ids[starts[:, None] + np.arange(calibration.length)].astype(np.int64))
    return list(chosen.split(rows))
