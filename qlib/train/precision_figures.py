"""The figures of training runs in several precisions, made from what `qlib.train.precisions` saw of each run."""

from typing import Any, Sequence

import numpy as np

from qlib.evaluate.statistics import paired_interval, ratio_interval, resample
from qlib.evaluate.tally import BOOTSTRAP, measured
from qlib.evaluate.timing import median_interval
from qlib.record import Measurement

__all__ = ["measurements_of", "details_of", "REFERENCE", "TURN"]

REFERENCE = "fp32"  # what the others are compared with
TURN = 10  # steps that a run takes before it is the next one's turn


def measurements_of(
    own: list[dict], base: list[dict], batch_tokens: int, owners: np.ndarray, draws: np.ndarray
) -> dict[str, Measurement]:
    """Figures of one precision from its runs and the fp32 runs, both by seed."""
    steps, seeds = len(own[0]["losses"]), len(own)
    conditions = f"{steps} steps of {batch_tokens} tokens, {seeds} seed(s)"
    seconds = [sum(spent for _, spent in run["turns"]) for run in own]
    speeds = np.concatenate([_speeds(run, batch_tokens) for run in own])
    found = {
        "train.seconds": Measurement(
            float(np.mean(seconds)), "seconds", seeds, method="steps of one run", conditions=conditions
        ),
        "train.tokens_per_second": measured(
            median_interval(speeds), "tokens/s", len(speeds), f"median turn of {TURN} steps, not the first", conditions
        ),
        "train.peak_rss_bytes": Measurement(
            max(run["peak"] for run in own), "bytes", seeds,
            method="highest anonymous memory of a process that trains in this precision alone, sampled",
            conditions=f"{own[0]['before']} bytes before training",
        ),
    }  # fmt: skip
    if own[0] is not base[0]:
        found["train.loss_difference"] = _loss_difference(own, base)
    if "scores" in own[0]:
        found |= _quality(own, base, owners, draws)
    return found


def _speeds(run: dict, batch_tokens: int) -> np.ndarray:
    """Tokens per second of each turn; the first warms up, unless it is the only one."""
    turns = run["turns"][1:] or run["turns"]
    return np.array([count * batch_tokens / spent for count, spent in turns])


def _loss_difference(own: list[dict], base: list[dict]) -> Measurement:
    """Loss minus that of fp32 on the same batch, over the last tenth of the steps that both took."""
    steps = len(own[0]["losses"])
    last = min(max(steps // 10, TURN), steps)
    rows = np.array([np.subtract(a["losses"], b["losses"][:steps])[-last:] for a, b in zip(own, base)])  # [seeds, last]
    conditions = f"steps {steps - last + 1} to {steps}"
    if len(rows) > 1:
        means = rows.mean(1)
        triple = means.mean(), means.min(), means.max()
        method = "mean over steps and seeds; from the least to the greatest seed"
        return measured(tuple(map(float, triple)), "nats", len(means), method, conditions)
    draws = resample(last, 1000, 0)
    triple, method = ratio_interval(rows[0], np.ones(last), draws), "mean over steps, one seed; bootstrap over steps"
    return measured(triple, "nats", last, method, conditions)


def _quality(own: list[dict], base: list[dict], owners: np.ndarray, draws: np.ndarray) -> dict[str, Measurement]:
    """Perplexity and its ratio to fp32, both of the mean log-likelihood over seeds."""
    documents = draws.shape[1]
    sums = {}
    for name, runs in (("own", own), ("base", base)):
        sums[name] = np.mean([np.bincount(owners, run["scores"][0], minlength=documents) for run in runs], axis=0)
    tokens = np.bincount(owners, own[0]["scores"][1], minlength=documents)
    seeds = f", mean over {len(own)} seeds" if len(own) > 1 else ""
    method = f"exp of the mean negative log-likelihood per token{seeds}; {BOOTSTRAP}"
    found = {
        "quality.perplexity": measured(
            ratio_interval(sums["own"], tokens, draws, np.exp), "perplexity", tokens.sum(), method
        )
    }
    if own[0] is not base[0]:
        ratio = paired_interval(sums["own"], sums["base"], tokens, draws, lambda a, b: np.exp(a - b))
        method = f"against fp32 with the same seed on the same text, paired{seeds}; {BOOTSTRAP}"
        found["quality.perplexity_ratio"] = measured(ratio, "ratio", tokens.sum(), method)
    return found


def details_of(found: list[dict[str, dict]], seeds: Sequence[int], batch_tokens: int) -> dict[str, Any]:
    """What else belongs into the record, by precision."""
    names = ("curves", "loss_scale", "zero_gradients", "lost_updates", "skipped_steps", "speedup", "memory", "by_seed")
    details: dict[str, Any] = {name: {} for name in names}
    for one in found[0]:
        runs = {str(seed): by[one] for seed, by in zip(seeds, found)}
        details["curves"][one] = {seed: _curve(run["losses"], batch_tokens) for seed, run in runs.items()}
        details["skipped_steps"][one] = {seed: run["skipped"] for seed, run in runs.items()}
        if one == "fp16":
            details["loss_scale"] = {seed: run["scales"] for seed, run in runs.items()}
        for key, name in (("zeros", "zero_gradients"), ("lost", "lost_updates")):
            points = {seed: [[at * batch_tokens, share] for at, share in run[key]] for seed, run in runs.items()}
            if all(share is not None for by in points.values() for _, share in by):
                details[name][one] = points
        keys = ("before", "peak", "cuda_peak")
        details["memory"][one] = {key: max(run[key] for run in runs.values()) for key in keys}
        details["speedup"][one] = _speedup(runs.values(), [by[REFERENCE] for by in found])
        if "scores" in found[0][one]:
            details["by_seed"][one] = {
                seed: float(np.exp(run["scores"][0].sum() / run["scores"][1].sum())) for seed, run in runs.items()
            }
    return details


def _curve(losses: Sequence[float], batch_tokens: int) -> list[list[float]]:
    """Points (tokens, mean loss of a turn)."""
    turns = [losses[at : at + TURN] for at in range(0, len(losses), TURN)]
    return [[(at * TURN + len(turn)) * batch_tokens, round(float(np.mean(turn)), 5)] for at, turn in enumerate(turns)]


def _speedup(own: Any, base: Sequence[dict]) -> list[float]:
    """Median ratio of the speeds of turns that stood side by side, and its interval."""
    pairs = [(_speeds(a, 1), _speeds(b, 1)) for a, b in zip(own, base)]
    ratios = np.concatenate([a / b[: len(a)] for a, b in pairs])
    return list(median_interval(ratios))
