"""One true layer of Qwen-72B pruned by Wanda and by SparseGPT: seconds, and peak memory against the memory of the layer.

Peak memory is what `compress` takes at most beyond what was there, the layer included. It is held against what a method
must hold beside the layer, in bytes:

    2 P               the layer's P weights once more, in bf16
    4 max(out x in)   its largest linear in fp32, to work on
    2 t (h + 3 f)     hidden states of the t tokens, and gate, up and product of the FFN, h and f wide, in bf16
    2 x 4 max(in)^2   SparseGPT alone: its largest Hessian, twice while it is factorized
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from qlib.bench.child import in_child
from qlib.bench.rows import Row, judge
from qlib.bench.subjects import random_model, random_windows
from qlib.compress import compress
from qlib.evaluate.memory import anonymous_bytes
from qlib.evaluate.timing import exclusive
from qlib.models.shapes import Shape, find_shape

__all__ = ["measure", "prune_layer", "must_hold", "Cost"]

#: Pass -> what it is called, and the seconds it may take.
METHODS = {"wanda": ("Wanda", 60), "sparsegpt": ("SparseGPT", 600)}
SAMPLES, LENGTH, SPARSITY = 16, 256, 0.5
BF16, FP32 = 2, 4  # bytes


@dataclass(frozen=True)
class Cost:
    """What pruning one layer took.

    Attributes:
        seconds: wall time. peak: bytes beyond what was there before.
    """

    seconds: float
    peak: int


def measure(root: Path) -> list[Row]:
    """Two rows for each method, measured once; calibration is random tokens."""
    shape = find_shape("qwen-72b")
    with exclusive():
        costs = {method: in_child(prune_layer, shape, method) for method in METHODS}
    return [row for method, cost in costs.items() for row in _rows(shape, method, cost)]


def prune_layer(shape: Shape, method: str) -> Cost:
    """Prune one layer of random weights; `method` is the name of a pass."""
    subject = random_model(1, shape.hidden, shape.ffn, shape.heads)
    windows, before = random_windows(SAMPLES, LENGTH), anonymous_bytes()
    found = compress(subject, [{"pass": method, "sparsity": SPARSITY}], windows).measurements
    return Cost(found["compress.seconds"].value, int(found["compress.peak_rss_bytes"].value) - before)


def must_hold(shape: Shape, method: str, tokens: int = SAMPLES * LENGTH) -> Mapping[str, int]:
    """Bytes that a method cannot do without, by what they are for; see above."""
    sizes = shape.linears.values()
    held = {
        "weights again": BF16 * shape.linear_parameters,
        "largest linear in fp32": FP32 * max(rows * width for rows, width in sizes),
        "activations": BF16 * tokens * (shape.hidden + 3 * shape.ffn),
    }
    hessian = FP32 * max(width for _, width in sizes) ** 2
    return held | ({"Hessian twice": 2 * hessian} if method == "sparsegpt" else {})


def _rows(shape: Shape, method: str, cost: Cost) -> list[Row]:
    held, (name, limit) = must_hold(shape, method), METHODS[method]
    how = f"sparsity {SPARSITY:g}, {SAMPLES} x {LENGTH} tokens, {torch.get_num_threads()} threads; walk included; once"
    terms = " + ".join(f"{what} {size / 1e9:.2f}" for what, size in held.items())
    layer = BF16 * shape.linear_parameters / 1e9
    memory = f"{cost.peak / 1e9:.2f} GB beyond the layer's {layer:.2f} GB; must hold {terms} GB; {how}"
    ratio = cost.peak / sum(held.values())
    return [
        judge(f"72B layer, {name}: seconds", f"<= {limit}", cost.seconds, "seconds", how),
        judge(f"72B layer, {name}: peak memory beyond the layer, over what it must hold", "<= 1", ratio, "ratio", memory),
    ]
