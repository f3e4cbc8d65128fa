"""A whole model of Qwen2.5-0.5B's shape: decode with int4 linears and int8 head, against bf16 and llama.cpp."""

from functools import partial
from pathlib import Path

import numpy as np
import torch

from qlib.bench.guests import Guest, llama
from qlib.bench.rows import Row, judge, missing, time_ratio
from qlib.errors import UserError
from qlib.evaluate import parts
from qlib.evaluate.fastest import FORMS, PlainLinear
from qlib.evaluate.timing import exclusive, median_interval, time_rounds
from qlib.layers.decode import Decoder
from qlib.models.shapes import find_shape

__all__ = ["measure"]

MODEL, CONTEXT, ROUNDS = "qwen2.5-0.5b", 256, 30
OURS = "int4-g128, int8 embedding and head"
OVER_BF16 = "whole Qwen2.5-0.5B, decode: int4 with int8 head over the best bf16"
OVER_LLAMA = "whole Qwen2.5-0.5B, decode: int4 with int8 head over llama.cpp Q4_0"


def measure(root: Path) -> list[Row]:
    """Both ratios from the same rounds. All of ours decode with the same static cache."""
    try:
        with exclusive(), llama("time_model", model=MODEL, kinds=["Q4_0", "F16"], threads=torch.get_num_threads()) as guest:
            times = _time(guest)
            theirs, about, failed = guest.milliseconds("decode", "Q4_0", ROUNDS), guest.about["conditions"], ""
    except UserError as error:
        with exclusive():
            times, failed = _time(None), str(error)
    how = ", ".join(f"{name} {median_interval(values)[0]:.2f} ms" for name, values in times.items())
    best = np.min([values for name, values in times.items() if name != OURS], axis=0)
    rows = [judge(OVER_BF16, ">= 2", time_ratio(best, times[OURS]), "times", how)]
    if failed:
        return [*rows, missing(OVER_LLAMA, ">= 0.8", "times", failed)]
    how += f", Q4_0 {np.median(theirs):.2f} ms; {about}"
    return [*rows, judge(OVER_LLAMA, ">= 0.8", time_ratio(theirs, times[OURS]), "times", how)]


@torch.inference_mode()
def _time(guest: Guest | None) -> dict[str, np.ndarray]:
    """Milliseconds of a token behind a context, for ours and every form of the baseline."""
    shape, random = find_shape(MODEL), torch.Generator().manual_seed(0)
    models = {form.name: ("bf16", form) for form in FORMS} | {OURS: ("int4-g128", PlainLinear)}
    decoders = {name: Decoder(parts.build_model(shape, *kind, random), CONTEXT + 1) for name, kind in models.items()}
    calls = {name: [partial(_step, decoder)] for name, decoder in decoders.items()}
    if guest:
        calls["guest"] = [partial(guest.ask, "decode")]
    times = time_rounds(calls, ROUNDS, torch.device("cpu")).rounds
    return {name: values for name, values in times.items() if name != "guest"}


def _step(decoder: Decoder) -> None:
    decoder.rewind(CONTEXT)
    decoder(torch.tensor([5]))
