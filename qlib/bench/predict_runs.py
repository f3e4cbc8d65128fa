"""Runs that predictions are fitted to and held against: small models of random weights, each in a process of its own."""

import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from qlib.bench.child import in_child
from qlib.models.shapes import Shape

__all__ = ["Job", "apart", "compress_once", "stream_once", "write_model"]

ROWS = 16  # windows of a batch, as in `qlib.data.calibration`


@dataclass(frozen=True)
class Job:
    """One recipe on one shape.

    Attributes:
        tokens: of calibration text, in windows of `length`.
    """

    shape: Shape
    recipe: list[dict[str, Any]]
    tokens: int
    length: int = 256
    streamed: bool = False
    measured: dict[str, float] = field(default_factory=dict)


def apart(job: Job) -> Job:
    """Run a job in a fresh process, whose memory holds nothing of what ran before, and return it with its figures."""
    if not job.streamed:
        return in_child(compress_once, job)
    with tempfile.TemporaryDirectory() as temporary:
        in_child(write_model, job.shape, Path(temporary) / "model")
        return in_child(stream_once, job, Path(temporary))


def _windows(job: Job) -> list[torch.Tensor]:
    from qlib.bench.subjects import random_windows

    return random_windows(job.tokens // job.length, job.length, job.shape.vocab, rows=ROWS)


def _subject(shape: Shape) -> Any:
    from qlib.bench.subjects import random_model

    return random_model(shape.layers, shape.hidden, shape.ffn, shape.heads, shape.vocab)


def compress_once(job: Job) -> Job:
    """Seconds, peak memory and sizes of compressing a model in memory."""
    from qlib.compress import compress
    from qlib.models.save import save

    windows, subject = _windows(job), _subject(job.shape)
    found = compress(subject, job.recipe, windows)
    seconds = sum(one["seconds"] for one in found.details["passes"])
    with tempfile.TemporaryDirectory() as temporary:
        sizes = save(found, Path(temporary) / "model")
    figures = {"compress_seconds": seconds, "compress_peak": found.measurements["compress.peak_rss_bytes"].value}
    sizes = {name: one if isinstance(one, dict) else asdict(one) for name, one in sizes.items()}
    figures |= {"disk": sizes["size.disk_bytes"]["value"], "resident": sizes["size.resident_bytes"]["value"]}
    return replace(job, measured=figures)


def write_model(shape: Shape, folder: Path) -> None:
    """A checkpoint for `stream_once`."""
    subject = _subject(shape)
    subject.model.save_pretrained(folder)
    subject.tokenizer.save_pretrained(folder)


def stream_once(job: Job, folder: Path) -> Job:
    """Seconds and peak memory of compressing the checkpoint in `folder`/model block by block."""
    from qlib.evaluate.memory import track_peak
    from qlib.stream.run import stream

    windows, begun = _windows(job), time.perf_counter()
    with track_peak() as peak:
        stream(str(folder / "model"), job.recipe, folder / "out", windows)
    return replace(job, measured={"stream_seconds": time.perf_counter() - begun, "stream_peak": peak.bytes})
