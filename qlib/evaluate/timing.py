"""How anything is timed here: alone, warmed up, in interleaved rounds, summed up by medians with intervals."""

import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch

from qlib.layers.graphs import recorded

__all__ = ["Timed", "time_rounds", "exclusive", "median_interval", "load_average"]

Calls = Mapping[str, Sequence[Callable[[], object]]]

#: Rounds of a warm-up batch, and how often it is repeated at most.
BATCH, BATCHES = 3, 4
#: After two batches, warming up also ends once it has taken so many seconds: long calls need no more of it.
WARM_SECONDS = 5.0
#: A round that takes so many seconds is a warm-up batch of its own: what its first call pays for is paid for then.
LONG_ROUND = 2.0
#: Copies of a thing that one round uses, at most.
SHARE = 64
SETTLED = 0.05
#: A GPU idles so long before what is timed, while Python launches it.
WAIT_CYCLES = 200_000
#: One for the machine (and user), whatever cache folder a run has been given.
LOCK = Path(tempfile.gettempdir()) / f"qlib-timing-{os.getuid()}.lock"


@dataclass(frozen=True)
class Timed:
    """Times of interleaved rounds.

    Attributes:
        rounds: name -> milliseconds of a call, the mean over its copies, `[rounds]`.
        warm_up: rounds run before. settled: whether medians stopped moving within the rounds allowed.
    """

    rounds: dict[str, np.ndarray]
    warm_up: int
    settled: bool


def time_rounds(calls: Calls, rounds: int, device: torch.device, batches: int = BATCHES, share: int = SHARE) -> Timed:
    """Time calls against each other in one process; on a GPU they are replayed as graphs, so that no Python is timed.

    Args:
        calls: name -> callables that do the same on different copies of their data. A round runs the next callables of
            every name, at most `share` of them, interleaved copy by copy in the order A B, B A, A B, ... so that
            drift hits all alike. A copy comes up again only after all others have.
        rounds: number of rounds that count.
        batches: upper bound of warm-up batches. Warming up ends once the median of every name moves by less than 5 %
            from one batch of rounds to the next.

    Returns:
        the rounds that count, and how many were run before them.
    """
    if device.type == "cuda":
        calls = {name: [recorded(call) for call in copies] for name, copies in calls.items()}
    before: dict[str, float] = {}
    settled, turn, begun = False, 0, time.perf_counter()
    for number in range(batches):
        if settled or (number >= 2 and time.perf_counter() - begun > WARM_SECONDS):
            break
        lap, batch = time.perf_counter(), [_round(calls, device, turn, share)]
        if time.perf_counter() - lap < LONG_ROUND:
            batch += [_round(calls, device, turn + index, share) for index in range(1, BATCH)]
        medians = {name: median(values[name] for values in batch) for name in calls}
        settled = bool(before) and all(abs(medians[name] / before[name] - 1) < SETTLED for name in calls)
        before, turn = medians, turn + len(batch)
    counted = [_round(calls, device, turn + index, share) for index in range(rounds)]
    return Timed({name: np.array([values[name] for values in counted]) for name in calls}, turn, settled)


def _round(calls: Calls, device: torch.device, turn: int, share: int) -> dict[str, float]:
    """One round: name -> mean milliseconds of the copies it used."""
    counts = {name: min(share, len(copies)) for name, copies in calls.items()}
    spent = dict.fromkeys(calls, 0.0)
    for step in range(max(counts.values())):
        for name in list(calls) if (turn + step) % 2 == 0 else list(calls)[::-1]:
            if step < counts[name]:
                copies = calls[name]
                spent[name] += _clock(copies[(turn * counts[name] + step) % len(copies)], device)
    return {name: 1e3 * seconds / counts[name] for name, seconds in spent.items()}


def _clock(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call; on a GPU from its own clock, the call waiting there before it starts."""
    if device.type != "cuda":
        begun = time.perf_counter()
        call()
        return time.perf_counter() - begun
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    torch.cuda._sleep(WAIT_CYCLES)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1e3


def median_interval(
    values: np.ndarray, seed: int = 0, times: int = 2000, level: float = 0.95
) -> tuple[float, float, float]:
    """Median of rounds and its bootstrap interval: value, low, high."""
    draws = np.random.default_rng(seed).integers(len(values), size=(times, len(values)))
    low, high = np.quantile(np.median(values[draws], axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(np.median(values)), float(low), float(high)


@contextmanager
def exclusive() -> Iterator[None]:
    """Hold the machine's timing lock, so that no two timings overlap; wait for it if need be."""
    with open(LOCK, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


def load_average() -> float:
    """Processes that wanted a processor during the last minute: above 0 before a timing, something else was running."""
    return os.getloadavg()[0]
