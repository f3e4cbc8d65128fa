"""Training steps of a model with 107 million parameters: how much faster bf16 autocast is than fp32, on the same batches."""

import time
from pathlib import Path

import numpy as np
import torch

from qlib.bench.rows import Row, judge
from qlib.bench.subjects import MEDIUM, random_model
from qlib.evaluate.timing import exclusive, median_interval
from qlib.train.pretrain import Schedule, Trainer, batch_at

__all__ = ["measure", "step_seconds"]

STEPS, LENGTH, BATCH_TOKENS, TARGET = 20, 256, 1024, 1.8


def measure(root: Path) -> list[Row]:
    """One row: both precisions take turns, step by step; the first step of each warms up."""
    with exclusive():
        seconds = step_seconds(("fp32", "bf16"), MEDIUM, STEPS)
    ratio = median_interval(seconds["fp32"][1:] / seconds["bf16"][1:])
    times = ", ".join(f"{name} {np.median(one[1:]):.2f} s" for name, one in seconds.items())
    how = f"{STEPS} steps of {BATCH_TOKENS // LENGTH} x {LENGTH} tokens, {torch.get_num_threads()} threads; a step: {times}"
    return [judge("training, 107M parameters: bf16 autocast over fp32", f">= {TARGET}", ratio, "times", how)]


def step_seconds(precisions: tuple[str, ...], sizes: dict[str, int], steps: int, batch_tokens: int = BATCH_TOKENS) -> dict[str, np.ndarray]:
    """Seconds of every step, `[steps]`, of training in each precision from the same weights on the same batches."""
    stream = np.random.default_rng(0).integers(0, sizes["vocab"], steps * batch_tokens, dtype=np.uint16)
    plan = {"tokens": steps * batch_tokens, "batch_tokens": batch_tokens, "stages": ((LENGTH, 1.0),), "compile": False}
    trainers = {}
    for one in precisions:
        model = random_model(**sizes).model
        model.set_attn_implementation("eager")  # on a CPU the plain form trains faster on short windows than the fused one
        trainers[one] = Trainer(model.requires_grad_(True).train(), Schedule(**plan, precision=one))
    spent: dict[str, list[float]] = {one: [] for one in precisions}
    for step in range(steps):
        for one in list(precisions) if step % 2 == 0 else list(precisions)[::-1]:
            batch = batch_at(stream, trainers[one].schedule, step)
            begun = time.perf_counter()
            trainers[one].step(batch, step)
            spent[one].append(time.perf_counter() - begun)
    return {one: np.array(seconds) for one, seconds in spent.items()}
