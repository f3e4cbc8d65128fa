"""How the time of GPTQ grows with the width of a linear and with the depth of a model."""

import time
from pathlib import Path

import numpy as np
import torch

from qlib.bench.rows import Row, judge
from qlib.bench.subjects import random_model, random_windows
from qlib.compress import compress
from qlib.evaluate.timing import exclusive
from qlib.quantize import gptq

__all__ = ["measure", "time_width", "time_depth"]

WIDTHS, DEPTHS = (1024, 2048, 4096, 8192), (2, 4, 8)
TOKENS = 4096


def measure(root: Path) -> list[Row]:
    """The exponents of both, by a straight line through the logarithms; theory: at most 3 in the width, 1 in the depth."""
    with exclusive():
        widths = {width: time_width(width) for width in WIDTHS}
        depths = {depth: time_depth(depth) for depth in DEPTHS}
    return [
        _exponent("gptq: exponent of time in the width of a square linear", "<= 3", widths, f"{TOKENS} tokens, 4 bits g128"),
        _exponent("gptq: exponent of time in the number of layers", "<= 1.1", depths, "hidden 512, 16 x 256 tokens"),
    ]


def time_width(width: int, tokens: int = TOKENS) -> float:
    """Seconds of Hessian, factor and solving of one linear `[width, width]`."""
    random = torch.Generator().manual_seed(0)
    weight, inputs = (torch.randn(rows, width, generator=random) for rows in (width, tokens))
    begun = time.perf_counter()
    statistic = gptq.Statistic(width, gptq.Options())
    statistic.feed(inputs)
    gptq.solve(weight, gptq.Options(), statistic=statistic)
    return time.perf_counter() - begun


def time_depth(layers: int) -> float:
    """Seconds of compressing a narrow model of so many layers."""
    subject = random_model(layers=layers, hidden=512, ffn=1408, heads=8)
    begun = time.perf_counter()
    compress(subject, [{"pass": "gptq", "bits": 4}], random_windows(16, 256))
    return time.perf_counter() - begun


def _exponent(name: str, target: str, seconds: dict[int, float], how: str) -> Row:
    slope = np.polyfit(np.log(list(seconds)), np.log(list(seconds.values())), 1)[0]
    spent = ", ".join(f"{size}: {value:.2f} s" for size, value in seconds.items())
    return judge(name, target, float(slope), "exponent", f"{how}; {spent}")
