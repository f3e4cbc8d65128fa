"""On a GPU: one true layer of Qwen-72B against torchao and gptqmodel, 2:4, the whole int4 model, GPTQ of a layer."""

import time
from pathlib import Path

import numpy as np
import torch

from qlib.bench.gpu_guests import GUESTS, form_of
from qlib.bench.rows import Row, judge, missing, time_ratio
from qlib.bench.subjects import random_model, random_windows
from qlib.compress import compress
from qlib.errors import UserError
from qlib.evaluate import parts
from qlib.evaluate.batches import batch_rounds
from qlib.evaluate.fastest import PlainLinear
from qlib.evaluate.roofline import ReadProbe
from qlib.evaluate.timing import median_interval, time_rounds
from qlib.layers.decode import Decoder
from qlib.layers.semi_structured import SemiStructuredLinear
from qlib.models.shapes import find_shape
from qlib.prune.select import choose_mask

__all__ = ["NEEDS", "measure"]

#: Without it, rows that another machine measured stay.
NEEDS = "cuda"
ROWS, ROUNDS = (1, 4, 16, 64, 256, 2048), 15
SPARSE = "bf16 2:4"
OURS = ("int4-g128", "int8", "int8-a8", "fp8-a8")
PROMPT, TOKENS = 256, 128
CALIBRATION = (16, 512)


def measure(root: Path) -> list[Row]:
    """Linears by rows, then the whole model, then GPTQ."""
    device = torch.device("cuda")
    with torch.inference_mode():
        rows = _linears(device)
        torch.cuda.empty_cache()
        rows.append(_whole_model(device))
    torch.cuda.empty_cache()
    return [*rows, _gptq(device)]


def _linears(device: torch.device) -> list[Row]:
    """Ours over bf16 and over every guest of the same kind, for one row to many."""
    shape, random = find_shape("qwen-72b"), torch.Generator().manual_seed(0)
    layers = {"bf16": [parts.build_layer(shape, "bf16", PlainLinear, device, random)[0]]}
    for format in OURS:
        layers[format] = [parts.build_layer(shape, format, PlainLinear, device, random)[0]]
    versions, failed = {}, {}
    try:
        layers[SPARSE] = [parts.build_layer(shape, "bf16", _two_of_four, device, random)[0]]
    except (RuntimeError, NotImplementedError) as error:  # this GPU, or this build of torch, has no such product
        failed[SPARSE] = str(error).splitlines()[0]
    for name in GUESTS:
        try:
            form, versions[name] = form_of(name)
            layers[name] = [parts.build_layer(shape, "bf16", form, device, random)[0]]
        except UserError as error:
            failed[name] = str(error)
    found = []
    for rows in ROWS:
        times = batch_rounds(shape, layers, rows, device, random, ROUNDS)
        how = ", ".join(f"{name} {median_interval(one)[0]:.3f} ms" for name, one in times.items())
        where = f"linears of a 72B layer, {rows} row{'s' if rows > 1 else ''}:"
        if SPARSE in failed:
            found.append(missing(f"{where} {SPARSE} over bf16", ">= 1", "times", failed[SPARSE]))
        else:
            ratio = time_ratio(times["bf16"], times[SPARSE])
            found.append(judge(f"{where} {SPARSE} over bf16", ">= 1", ratio, "times", how))
        for format in OURS:
            name = f"{where} {format} over"
            found.append(judge(f"{name} bf16", ">= 1", time_ratio(times["bf16"], times[format]), "times", how))
            for guest in (one for one, (_, same, _) in GUESTS.items() if same == format):
                if guest in failed:
                    found.append(missing(f"{name} {guest}", ">= 1", "times", failed[guest]))
                    continue
                ratio = time_ratio(times[guest], times[format])
                found.append(judge(f"{name} {guest}", ">= 1", ratio, "times", f"{versions[guest]}; {how}"))
    return found


def _two_of_four(weight: torch.Tensor, bias: torch.Tensor | None) -> SemiStructuredLinear:
    return SemiStructuredLinear(weight * choose_mask(weight.abs(), 0.5, "2:4"), bias)


def _whole_model(device: torch.device) -> Row:
    """Greedy decoding of the whole int4 model with a static cache, as a user would wait for it."""
    shape, random = find_shape("qwen-72b"), torch.Generator().manual_seed(0)
    torch.cuda.reset_peak_memory_stats()
    model = parts.build_model(shape, "int4-g128", PlainLinear, random, device)
    decoder, prompt = Decoder(model, PROMPT + TOKENS), torch.arange(PROMPT, device=device)
    decoder(prompt)  # kernels are compiled and chosen
    decoder(prompt[:1])
    decoder.rewind()
    begun = _now()
    token = decoder(prompt).argmax()[None]
    prefill = _now() - begun
    spent = []
    for _ in range(TOKENS):
        begun = _now()
        token = decoder(token).argmax()[None]
        spent.append(_now() - begun)
    probe = ReadProbe(device)
    reads = time_rounds({"probe": [probe]}, len(spent), device).rounds["probe"]
    floor = (shape.layers * parts.layer_bytes(shape, "int4-g128", PROMPT) + parts.head_bytes(shape) / 2) / 1e6
    share = time_ratio(floor / probe.gigabytes_per_second(reads), 1e3 * np.array(spent))
    median, low, high = median_interval(1 / np.array(spent))
    gigabytes = torch.cuda.max_memory_allocated() / 1e9
    how = (
        f"{median:.1f} tokens per second ({low:.1f} to {high:.1f}), batch 1, {TOKENS} tokens behind a prompt of {PROMPT}, "
        f"which takes {1e3 * prefill:.0f} ms; int8 embedding and head; {gigabytes:.1f} GB of GPU memory at most; "
        f"read bandwidth {probe.gigabytes_per_second(np.median(reads)):.0f} GB/s; random weights"
    )
    return judge("whole Qwen-72B, int4, decode: share of its roofline", ">= 0.6", share, "fraction", how)


def _gptq(device: torch.device) -> Row:
    """Seconds of quantizing one true layer."""
    shape = find_shape("qwen-72b")
    subject = random_model(1, shape.hidden, shape.ffn, shape.heads)
    subject.model.to(device)
    torch.cuda.reset_peak_memory_stats()
    begun = _now()
    compress(subject, [{"pass": "gptq", "bits": 4}], random_windows(*CALIBRATION))
    seconds = _now() - begun
    samples, length = CALIBRATION
    gigabytes = torch.cuda.max_memory_allocated() / 1e9
    how = f"4 bits g128, {samples} x {length} tokens, walk and packing included; {gigabytes:.1f} GB of GPU memory at most; once"
    return judge("GPTQ of one 72B layer", "<= 60", seconds, "seconds", how)


def _now() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()
