"""One true layer of Qwen-72B: decode against llama.cpp and the roofline, prefill against bf16."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch

from qlib.bench.guests import Guest, llama
from qlib.bench.rows import Row, judge, missing, time_ratio
from qlib.errors import UserError
from qlib.evaluate import parts
from qlib.evaluate.fastest import fastest_form
from qlib.evaluate.roofline import ReadProbe
from qlib.evaluate.timing import exclusive, median_interval, time_rounds
from qlib.models.shapes import find_shape

__all__ = ["measure"]

ROUNDS, CONTEXT = 15, 256
CPU = torch.device("cpu")
ROOFLINE = {"int4-g128": 0.8, "int8": 0.85, "bf16": 0.8}
LLAMA = {"int4-g128": ("Q4_0", 1.0), "int8": ("Q8_0", 1.2)}


def measure(root: Path) -> list[Row]:
    """Decode rows first, then prefill rows."""
    threads, failed, guest = torch.get_num_threads(), "", nullcontext(None)
    try:
        guest = llama("time_layer", model="qwen-72b", kinds=["Q4_0", "Q8_0", "F16"], threads=threads, context=CONTEXT)
        with exclusive(), guest as other:
            decode = _time(1, ("bf16", "int8", "int4-g128"), other)
            rows = _decode_rows(decode, other)
    except UserError as error:
        failed = str(error)
        with exclusive():
            rows = _decode_rows(_time(1, ("bf16", "int8", "int4-g128"), None), None, failed)
    with exclusive():
        short = _time(256, ("bf16", "int8-a8", "int4-g128"), None, rounds=7)
        long = _time(2048, ("bf16", "int4-g128"), None, rounds=3)
    return rows + [
        judge("72B layer, prefill of 256: W8A8 over bf16", ">= 1.5", time_ratio(short["bf16"], short["int8-a8"]), "times", _ms(short)),
        judge("72B layer, prefill of 256: time of int4 over bf16", "<= 1.2", time_ratio(short["int4-g128"], short["bf16"]), "ratio", _ms(short)),
        judge("72B layer, prefill of 2048: time of int4 over bf16", "<= 1.05", time_ratio(long["int4-g128"], long["bf16"]), "ratio", _ms(long)),
    ]  # fmt: skip


def _time(rows: int, formats: tuple[str, ...], guest: Guest | None, rounds: int = ROUNDS) -> dict[str, np.ndarray]:
    """Milliseconds of one layer by format, and under "floor" + format the roofline floors of the same rounds."""
    shape, random = find_shape("qwen-72b"), torch.Generator().manual_seed(0)
    context = CONTEXT if rows == 1 else 0
    with torch.inference_mode():
        form, _ = fastest_form(parts.random_tensor(shape.linears["mlp.gate_proj"], CPU, random), rows)
        work = parts.Workload(shape, rows, context, CPU, random)
        layers = {format: parts.build_layer(shape, format, form, CPU, random)[0] for format in formats}
        calls = {format: [partial(work.run, layer)] for format, layer in layers.items()}
        probe = ReadProbe(CPU)
        calls["probe"] = [probe]
        if guest:
            calls["guest"] = [partial(guest.ask, "decode")]
        times = dict(time_rounds(calls, rounds, CPU).rounds)
    bandwidth = probe.gigabytes_per_second(times.pop("probe"))
    times.pop("guest", None)
    floors = {f"floor {f}": parts.layer_bytes(shape, f, context + rows) / bandwidth / 1e6 for f in formats}
    return times | floors


def _decode_rows(times: dict[str, np.ndarray], guest: Guest | None, failed: str = "") -> list[Row]:
    rows = []
    for format, target in ROOFLINE.items():
        share = time_ratio(times[f"floor {format}"], times[format])
        rows.append(judge(f"72B layer, decode: {format}, share of its roofline", f">= {target}", share, "fraction", _ms(times)))
    for format, (kind, target) in LLAMA.items():
        name = f"72B layer, decode: {format} over llama.cpp {kind}"
        if guest is None:
            rows.append(missing(name, f">= {target}", "times", failed))
            continue
        theirs = guest.milliseconds("decode", kind, ROUNDS)
        how = f"{_ms(times)}; {kind} {np.median(theirs):.1f} ms without what a call costs; {guest.about['conditions']}"
        rows.append(judge(name, f">= {target}", time_ratio(theirs, times[format]), "times", how))
    return rows


def _ms(times: dict[str, np.ndarray]) -> str:
    return ", ".join(f"{name} {median_interval(values)[0]:.1f} ms" for name, values in times.items())
