"""The short benchmark behind predictions: what this machine does of each kind of work per second."""

import subprocess
import sys
from typing import Callable

import torch
import torch.nn.functional as F

from qlib.evaluate import parts
from qlib.evaluate.fastest import PlainLinear
from qlib.evaluate.footprint import grid_of
from qlib.evaluate.roofline import ReadProbe
from qlib.evaluate.timing import exclusive, median_interval, time_rounds
from qlib.layers import pack
from qlib.quantize import gptq
from qlib.quantize.grid import fit_grid, round_to_grid

__all__ = ["measure_rates", "process_bytes"]

ROUNDS, TOKENS = 5, 1024
#: Widths at which products are timed; the Hessian and its factor grow large.
WIDTHS, WIDE = (256, 512, 1024, 2048), (256, 512, 1024, 2048, 4096)
FEW_TOKENS = 256  # of a prefill
NUMBERS = 2**24
FORMATS = {"int4": "int4-g128", "int8": "int8", "int8-a8": "int8-a8"}

Call = Callable[[], object]


@torch.inference_mode()
def measure_rates(device: torch.device) -> dict[str, dict[int, float]]:
    """Kind of work -> size -> how many a second; medians of interleaved rounds, alone on the machine."""
    generator = torch.Generator().manual_seed(0)
    calls: dict[tuple[str, int], tuple[float, Call]] = {}
    for width in WIDTHS:
        calls |= _products(width, device, generator)
    for width in WIDE:
        calls |= _hessian(width, device, generator)
    numbers = torch.ones(NUMBERS, device=device)
    calls["elementwise", 0] = (NUMBERS, lambda: numbers.mul_(1.0))
    packed = _packed("int4-g128", 2048, device, generator)
    calls["dequantize", 0] = (2048**2, lambda: packed.compressed().dequantize())
    row, small = torch.ones(1, 64, device=device), torch.ones(64, 64, device=device)
    calls["calls", 0] = (1, lambda: F.linear(row, small))
    probe = ReadProbe(device)
    calls["read", 0] = (probe.bytes, probe)
    with exclusive():
        timed = time_rounds({f"{kind} {size}": [call] for (kind, size), (_, call) in calls.items()}, ROUNDS, device, batches=2)
    rates: dict[str, dict[int, float]] = {}
    for (kind, size), (count, _) in calls.items():
        rates.setdefault(kind, {})[size] = 1e3 * count / median_interval(timed.rounds[f"{kind} {size}"])[0]
    return rates


def _products(width: int, device: torch.device, generator: torch.Generator) -> dict[tuple[str, int], tuple[float, Call]]:
    """Products of many rows with a square weight: plain in both types, and packed."""
    x, weight = (parts.random_tensor((rows, width), device, generator) for rows in (TOKENS, width))
    long, square = x.float(), weight.float()
    count = 2.0 * TOKENS * width**2
    calls = {("bf16", width): (count, lambda: F.linear(x, weight)), ("fp32", width): (count, lambda: F.linear(long, square))}
    few = x[:FEW_TOKENS]
    for kind, format in FORMATS.items():
        layer = _packed(format, width, device, generator)
        calls[kind, width] = (count * FEW_TOKENS / TOKENS, lambda layer=layer: layer(few))
    return calls


def _packed(format: str, width: int, device: torch.device, generator: torch.Generator) -> torch.nn.Module:
    weight, grid = parts.random_tensor((width, width), device, generator), grid_of(format)
    return pack(PlainLinear(weight), round_to_grid(weight, grid, *fit_grid(weight, grid)))


def _hessian(width: int, device: torch.device, generator: torch.Generator) -> dict[tuple[str, int], tuple[float, Call]]:
    """GPTQ's sum of x x^T, half of a product, and its factor."""
    x = parts.random_tensor((TOKENS, width), device, generator, scale=1.0)
    statistic = gptq.Statistic(width, gptq.Options())
    statistic.feed(x)
    hessian = statistic.hessian + torch.eye(width, device=device) * TOKENS
    hessian = hessian.tril() + hessian.tril(-1).t()
    return {
        ("hessian", width): (float(TOKENS * width**2), lambda: statistic.feed(x)),
        ("factor", width): (width**3 / 3, lambda: gptq.factorize(hessian)),
    }


def process_bytes() -> int:
    """Anonymous memory of a fresh process that has imported what compresses a model, and compressed the smallest."""
    asked = (
        "from qlib.compress import compress\n"
        "from qlib.evaluate.memory import anonymous_bytes\n"
        "from qlib.models.load import load\n"
        "subject = compress(load('reference'), [{'pass': 'rtn', 'bits': 4}])\n"
        "print(anonymous_bytes())"
    )
    done = subprocess.run([sys.executable, "-c", asked], check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])
