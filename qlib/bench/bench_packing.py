"""How fast true 72B weights are packed, and how much longer than copying and packing streaming them takes."""

import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from qlib.bench.bench_stream import SHALLOW, RTN, lacks_disk
from qlib.bench.rows import Row, judge, missing
from qlib.bench.subjects import write_random_checkpoint
from qlib.blockwise import compress_block
from qlib.evaluate.timing import exclusive, median_interval
from qlib.models.load import locate
from qlib.models.save import checkpoint_tensors
from qlib.models.shapes import find_shape
from qlib.progress import progress
from qlib.recipe import read_recipe
from qlib.stream.blocks import BlocksOnDisk
from qlib.stream.run import stream
from qlib.stream.source import open_model
from qlib.walk import Visit

__all__ = ["measure", "pack_block"]

ROUNDS = 3


def measure(root: Path) -> list[Row]:
    """Speed of packing in memory, and of a stream; rounds take turns."""
    if why := lacks_disk(root):
        return [missing("72B layer, RTN int4: weights packed a second", ">= 0.4", "GB/s", why)]
    with tempfile.TemporaryDirectory(dir=root, prefix=".bench-packing-") as folder, exclusive():
        model = Path(folder) / "model"
        write_random_checkpoint(model, find_shape("qwen-72b"), SHALLOW)
        return _speed(model, Path(folder))


def _speed(model: Path, folder: Path) -> list[Row]:
    weights = 2 * find_shape("qwen-72b").linear_parameters
    packing, copying, streaming = [], [], []
    pack_block(model)  # warm up
    for _ in progress(0, ROUNDS, "copying, packing, streaming"):
        packing.append(pack_block(model))
        copying.append(_copy(model, folder / "copy"))
        streaming.append(_stream(model, folder / "streamed"))
    rate = median_interval(weights / 1e9 / np.array(packing))
    parts = np.array(copying) + SHALLOW * np.array(packing)
    how = f"{torch.get_num_threads()} threads, {ROUNDS} rounds; files in the page cache, written through to the disk"
    told = f"{SHALLOW} layers: copy {np.median(copying):.1f} s, pack {SHALLOW * np.median(packing):.1f} s, stream {np.median(streaming):.1f} s"
    return [
        judge("72B layer, RTN int4: weights packed a second", ">= 0.4", rate, "GB/s", how),
        judge("72B, RTN int4 streamed: time over copying and packing", "<= 1.3", median_interval(np.array(streaming) / parts), "ratio", f"{how}; {told}"),
    ]  # fmt: skip


def pack_block(model: Path) -> float:
    """Seconds in which the weights of one block, in memory, become the tensors of a checkpoint."""
    subject, stored = open_model(locate(str(model)))
    blocks = BlocksOnDisk(subject.model, stored, model)
    with blocks.open(0) as block:
        begun = time.perf_counter()
        compress_block(Visit(0, "model.layers.0", block, [], None, False), read_recipe(RTN), None, {}, subject.config, 0)
        checkpoint_tensors(subject.model)
        return time.perf_counter() - begun


def _copy(model: Path, target: Path) -> float:
    """Seconds of copying the shards."""
    begun = time.perf_counter()
    target.mkdir()
    for file in model.glob("*.safetensors"):
        with file.open("rb") as source, (target / file.name).open("wb") as copy:
            shutil.copyfileobj(source, copy, 2**24)
            copy.flush()
            os.fsync(copy.fileno())
    spent = time.perf_counter() - begun
    shutil.rmtree(target)
    return spent


def _stream(model: Path, target: Path) -> float:
    """Seconds of streaming the same shards."""
    begun = time.perf_counter()
    stream(str(model), RTN, target)
    spent = time.perf_counter() - begun
    shutil.rmtree(target)
    return spent
