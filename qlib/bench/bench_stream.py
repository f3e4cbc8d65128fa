"""Compressing true 72B layers from disk to disk: peak memory within a limit, whatever the depth."""

import json
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from qlib.bench.limited import run_limited
from qlib.bench.rows import Row, judge, missing
from qlib.bench.subjects import random_windows, write_random_checkpoint
from qlib.evaluate.memory import anonymous_bytes, track_peak
from qlib.models.shapes import find_shape
from qlib.stream.manifest import NAME
from qlib.stream.run import INDEX, stream

__all__ = ["measure", "measure_methods", "peaks_of", "lacks_disk", "keep_layers", "SHALLOW", "RTN"]

GIB = 2**30
RTN = [{"pass": "rtn", "bits": 4}]
SHALLOW, DEEP = 3, 6
#: What it is called, its recipe, the memory it may take, and on how many layers: GPTQ takes minutes for each.
METHODS = {
    "RTN int4": (RTN, 6 * GIB, DEEP),
    "Wanda 50 %": ([{"pass": "wanda", "sparsity": 0.5}], 6 * GIB, DEEP),
    "GPTQ int4": ([{"pass": "gptq", "bits": 4}], 14 * GIB, DEEP),
}
SAMPLES, LENGTH = 16, 512
DISK = 40e9  # bytes that must be free


def measure(root: Path) -> list[Row]:
    """Rows of the methods that take minutes for a layer at most; for GPTQ see `bench_stream_gptq`."""
    return measure_methods(root, ("RTN int4", "Wanda 50 %"))


def measure_methods(root: Path, names: Sequence[str]) -> list[Row]:
    """Peak memory of each method, each in a process of its own, whose times are not the point."""
    if why := lacks_disk(root):
        return [missing("72B layers, streamed: peak anonymous memory", "<= 6", "GiB", why)]
    with tempfile.TemporaryDirectory(dir=root, prefix=".bench-stream-") as folder:
        model, rows = Path(folder) / "model", []
        write_random_checkpoint(model, find_shape("qwen-72b"), DEEP)
        for layers in (DEEP, SHALLOW):
            keep_layers(model, layers)
            for name in (name for name in names if METHODS[name][2] == layers):
                rows += _memory(model, Path(folder) / f"streamed-{len(rows)}", name)
        return rows


def lacks_disk(root: Path) -> str:
    """What is missing for the checkpoint and what becomes of it; empty: nothing."""
    free = shutil.disk_usage(root).free
    return "" if free >= DISK else f"{DISK / 1e9:.0f} GB of disk are needed, {free / 1e9:.0f} are free"


def keep_layers(model: Path, layers: int) -> None:
    """Cut a checkpoint of `write_random_checkpoint` down to so many layers."""
    index, config = (json.loads((model / name).read_text()) for name in (INDEX, "config.json"))
    if config["num_hidden_layers"] == layers:
        return
    kept = {f"layer-{at}.safetensors" for at in range(layers)} | {"rest.safetensors"}
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file in kept}
    config |= {"num_hidden_layers": layers} | {"layer_types": kinds[:layers] for kinds in [config.get("layer_types")] if kinds}
    for name, content in ((INDEX, index), ("config.json", config)):
        (model / name).write_text(json.dumps(content))
    for file in model.glob("*.safetensors"):
        if file.name not in kept:
            file.unlink()


def _memory(model: Path, output: Path, name: str) -> list[Row]:
    """Run one method in a process that may not take more than its limit; a row, and one more where there are more layers."""
    recipe, limit, layers = METHODS[name]
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
    how = f"{SAMPLES} x {LENGTH} tokens; {interpreter / GIB:.2f} GiB before it began; {group}; {layers} layers in {spent:.0f} s; once"
    rows = [judge(what, f"<= {limit / GIB:.0f}", shallow / GIB, "GiB", how)]
    if layers > SHALLOW:
        rows.append(judge(f"72B, {layers} layers over {SHALLOW}, streamed, {name}: peak memory", "<= 1.05", deep / shallow, "ratio", how))
    return rows


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
