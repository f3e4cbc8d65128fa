"""Compressing true 72B layers from disk to disk: peak memory within a limit, whatever the depth, and the speed of packing."""

import json
import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch

from qlib.bench.limited import run_limited
from qlib.bench.rows import Row, judge, missing
from qlib.bench.subjects import random_windows, write_random_checkpoint
from qlib.blockwise import compress_block
from qlib.evaluate.memory import anonymous_bytes, track_peak
from qlib.evaluate.timing import exclusive, median_interval
from qlib.models.load import locate
from qlib.models.save import checkpoint_tensors
from qlib.models.shapes import find_shape
from qlib.progress import progress
from qlib.recipe import read_recipe
from qlib.stream.blocks import BlocksOnDisk
from qlib.stream.manifest import NAME
from qlib.stream.run import stream
from qlib.stream.source import open_model
from qlib.walk import Visit

__all__ = ["measure", "peaks_of", "pack_block"]

GIB = 2**30
RTN = [{"pass": "rtn", "bits": 4}]
#: What it is called, its recipe, and the memory it may take.
METHODS = {
    "RTN int4": (RTN, 6 * GIB),
    "Wanda 50 %": ([{"pass": "wanda", "sparsity": 0.5}], 6 * GIB),
    "GPTQ int4": ([{"pass": "gptq", "bits": 4}], 14 * GIB),
}
SHALLOW, DEEP = 3, 6
SAMPLES, LENGTH = 16, 512
ROUNDS = 3
DISK = 40e9  # bytes that must be free


def measure(root: Path) -> list[Row]:
    """Peak memory of each method at 3 and 6 layers, each in a process of its own; speed of RTN."""
    free = shutil.disk_usage(root).free
    if free < DISK:
        why = f"{DISK / 1e9:.0f} GB of disk are needed, {free / 1e9:.0f} are free"
        return [missing("72B layers, streamed", "", "GiB", why)]
    with tempfile.TemporaryDirectory(dir=root, prefix=".bench-stream-") as folder, exclusive():
        model = Path(folder) / "model"
        write_random_checkpoint(model, find_shape("qwen-72b"), DEEP)
        rows = _speed(model, Path(folder))
        for index, (name, (recipe, limit)) in enumerate(METHODS.items()):
            rows += _memory(model, Path(folder) / f"streamed-{index}", name, recipe, limit)
        return rows


def _memory(model: Path, output: Path, name: str, recipe: list[dict], limit: int) -> list[Row]:
    """Run one method in a process that may not take more than `limit`; two rows."""
    code = "import json, sys; from qlib.bench.bench_stream import peaks_of; print(json.dumps(peaks_of(*map(json.loads, sys.argv[1:]))))"
    told = [json.dumps(one) for one in (str(model), str(output), recipe)]
    what = f"72B, {SHALLOW} layers streamed, {name}: peak anonymous memory"
    begun = time.perf_counter()
    done = run_limited([sys.executable, "-c", code, *told], limit)
    spent = time.perf_counter() - begun
    shutil.rmtree(output, ignore_errors=True)
    if done.killed:
        return [missing(what, f"<= {limit / GIB:.0f}", "GiB", f"the kernel ended it at the limit, after {spent:.0f} s")]
    interpreter, shallow, deep = json.loads(done.output)
    group = "no control group could be made" if done.peak is None else f"within a control group of {limit / GIB:.0f} GiB"
    how = f"{SAMPLES} x {LENGTH} tokens; {interpreter / GIB:.2f} GiB before it began; {group}; {DEEP} layers in {spent:.0f} s; once"
    return [
        judge(what, f"<= {limit / GIB:.0f}", shallow / GIB, "GiB", how),
        judge(f"72B, {DEEP} layers over {SHALLOW}, streamed, {name}: peak memory", "<= 1.05", deep / shallow, "ratio", how),
    ]


def peaks_of(model: str, output: str, recipe: list[dict]) -> tuple[int, int, int]:
    """Anonymous bytes before a stream begins, at most until its third layer is written, and at most until its end."""
    before, found = anonymous_bytes(), {}

    def watch() -> None:
        while SHALLOW not in found and not over.wait(0.05):
            if (Path(output) / NAME).is_file() and len(json.loads((Path(output) / NAME).read_text())["shards"]) > SHALLOW:
                found[SHALLOW] = peak.bytes

    over = threading.Event()
    with track_peak() as peak:
        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        stream(model, recipe, output, random_windows(SAMPLES, LENGTH, rows=4))
        over.set()
        thread.join()
    return before, found.get(SHALLOW, peak.bytes), peak.bytes


def _speed(model: Path, folder: Path) -> list[Row]:
    """How fast weights are packed in memory, and how long a stream takes over copying and packing; rounds take turns."""
    weights = 2 * find_shape("qwen-72b").linear_parameters
    packing, copying, streaming = [], [], []
    pack_block(model)  # warm up
    for _ in progress(0, ROUNDS, "copying, packing, streaming"):
        packing.append(pack_block(model))
        copying.append(_copy(model, folder / "copy"))
        streaming.append(_stream(model, folder / "streamed"))
    rate = median_interval(weights / 1e9 / np.array(packing))
    parts = np.array(copying) + DEEP * np.array(packing)
    how = f"{torch.get_num_threads()} threads, {ROUNDS} rounds; files in the page cache, written through to the disk"
    told = f"{DEEP} layers: copy {np.median(copying):.1f} s, pack {DEEP * np.median(packing):.1f} s, stream {np.median(streaming):.1f} s"
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
