"""Compare training precisions: the same model, weights, batches and steps, in fp32, tf32, mixed precision and pure bf16.

Every precision trains in a process of its own, so that its peak memory is its own, and the processes take turns of a
few steps, so that whatever else happens to the machine happens to all of them.
"""

import time
from dataclasses import dataclass
from typing import Any, Sequence

import numpy as np
import torch

from qlib.data.source import hash_documents, read_documents
from qlib.data.tokenizer import encode, start_token
from qlib.data.training_text import read_training
from qlib.errors import UserError
from qlib.evaluate.items import cut_windows
from qlib.evaluate.logits import ModelLogits
from qlib.evaluate.memory import anonymous_bytes, track_peak
from qlib.evaluate.precision import in_float32
from qlib.evaluate.quality import score_windows
from qlib.evaluate.statistics import resample
from qlib.evaluate.timing import exclusive
from qlib.models.load import load
from qlib.progress import progress
from qlib.record import Measurement
from qlib.train.precision_figures import REFERENCE, TURN, details_of, measurements_of
from qlib.train.precision import FORMATS, check_precision
from qlib.train.pretrain import Schedule, Trainer, batch_at
from qlib.train.remote import Remote

__all__ = ["compare_precisions", "Comparison", "Run", "random_weights", "REFERENCE"]

SETTINGS = {"compile": False, "final_share": 0.1, "warmup": 0.05}


@dataclass(frozen=True)
class Comparison:
    """What `compare_precisions` found.

    Attributes:
        formats: precision -> measurements under the record's fixed names.
        details: curves, loss scales, memory before training, speed ratios, and the protocol line.
    """

    formats: dict[str, dict[str, Measurement]]
    details: dict[str, Any]


def random_weights(config: Any, seed: int, device: str = "cpu") -> torch.nn.Module:
    """A model of a configuration with random fp32 weights; the caller's random state is left as it was."""
    from transformers import AutoModelForCausalLM

    # Attention in the plain form: on a CPU its backward pass is faster for short sequences than that of the fused one.
    form = "eager" if device == "cpu" else "sdpa"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=form, dtype=torch.float32)
    return model.to(device)


class Run:
    """The training of one precision; lives in the process of its own.

    Args:
        shape: the model's configuration.
        schedule: how to train, for every seed alike.
        stream: token ids `[tokens]`.
    """

    def __init__(self, shape: Any, schedule: Schedule, stream: np.ndarray, device: str, threads: int):
        torch.set_num_threads(threads)
        self.shape, self.schedule, self.stream, self.device = shape, schedule, stream, device
        self.peak = self.before = anonymous_bytes()

    def begin(self, seed: int) -> int:
        """Start again from random weights; returns the bytes of memory before the first run."""
        self.schedule = Schedule(**(vars(self.schedule) | {"seed": seed}))
        self.trainer = Trainer(random_weights(self.shape, seed, self.device).train(), self.schedule)
        return self.before

    def steps(self, first: int, count: int) -> dict[str, Any]:
        """Take steps; returns their losses, seconds, the loss scale after them and how many were skipped so far.

        Also, of the last step, the share of gradients that were 0 (`zeros`) and, of pure bf16, of updates that were lost.
        """
        with track_peak() as peak:
            begun = time.perf_counter()
            numbers = range(first, first + count)
            losses = [self._step(number) for number in numbers[:-1]]
            seconds = time.perf_counter() - begun
            self.trainer.watch = True  # in the last step alone, and outside of what is timed
            begun = time.perf_counter()
            losses.append(self._step(numbers[-1]))
            last = time.perf_counter() - begun
            self.trainer.watch = False
        self.peak = max(self.peak, peak.bytes)
        seconds = seconds * count / (count - 1) if count > 1 else last
        found = {"losses": losses, "seconds": seconds, "peak": self.peak, "zeros": self.trainer.zeros}
        optimizer = self.trainer.optimizer
        lost = optimizer.lost / max(optimizer.updates, 1) if hasattr(optimizer, "lost") else None
        found |= {"scale": self.trainer.scale, "skipped": self.trainer.skipped, "lost": lost}
        return found | {"cuda_peak": self._cuda_peak()}

    def _step(self, number: int) -> float:
        return self.trainer.step(batch_at(self.stream, self.schedule, number), number)

    def score(self, windows: Sequence[Sequence[int]], start: int) -> tuple[np.ndarray, np.ndarray]:
        """Negative log-likelihood and tokens of each window, in fp32 whatever trained the weights."""
        with in_float32(self.trainer.model.eval()) as model:
            scores = score_windows(ModelLogits(model), windows, start)
        return scores.nll, scores.tokens

    def _cuda_peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.device == "cuda" else 0


def compare_precisions(
    training: Any,
    precisions: Sequence[str],
    model: str,
    calibration: Any,
    evaluation: Any,
    seed: int = 0,
    device: str = "cpu",
) -> Comparison:
    """Train models of the shape of `model` from random weights, one in each precision, and compare them.

    Args:
        training: has ``tokens``, ``length``, ``batch_tokens``, ``peak_lr``, ``seeds`` and ``fp16_steps``: fp16 ends
            after so many steps on a CPU, which has no fast path for it, and has no final quality then.
        precisions: fp32 and others of `qlib.train.precision`.
        calibration: has ``text``, the training split of which is trained on.
        evaluation: has ``text``, ``documents``, ``length`` and ``bootstrap``; its evaluation split is scored.
        seed: of the first run's weights and order of batches; further seeds count up from it.

    Raises:
        UserError: fp32 is missing, a precision is unknown or not available on `device`.
    """
    check_precisions(precisions, device)
    subject = load(model)
    start = start_token(subject.tokenizer)
    stream = read_training(subject.tokenizer, calibration.text, training.tokens, seed)
    documents = read_documents(evaluation.text, "evaluation")[: evaluation.documents]
    windows = cut_windows(encode(subject.tokenizer, [document.text for document in documents]), evaluation.length)
    schedules = {one: schedule_of(training, one) for one in precisions}
    lengths = {one: schedule.steps for one, schedule in schedules.items()}
    for one in lengths:
        if device == "cpu" and FORMATS[one].autocast == torch.float16:
            lengths[one] = min(training.fp16_steps, lengths[one])
    seeds = range(seed, seed + training.seeds)
    threads = torch.get_num_threads()
    runs: dict[str, Remote] = {}
    try:
        with exclusive():
            for one in precisions:
                runs[one] = Remote(Run, subject.config, schedules[one], stream, device, threads)
            texts = [window for _, window in windows]
            found = [_train(runs, one_seed, lengths, texts, start) for one_seed in seeds]
    finally:
        for run in runs.values():
            run.close()
    owners = np.array([number for number, _ in windows])
    draws = resample(len(documents), evaluation.bootstrap, seed)
    base = [by[REFERENCE] for by in found]
    tokens = training.batch_tokens
    formats = {one: measurements_of([by[one] for by in found], base, tokens, owners, draws) for one in precisions}
    data = hash_documents(evaluation.text, documents)
    protocol = (
        f"{training.seeds} seed(s) of {training.tokens} tokens, training split of {calibration.text}, length "
        f"{training.length}, {training.batch_tokens} tokens a step, peak rate {training.peak_lr:g}, eager, {threads} "
        f"threads, {device}; scored in fp32 on {len(documents)} documents of the evaluation split of {evaluation.text} "
        f"{data[:12]}, context {evaluation.length}"
    )
    details = details_of(found, seeds, tokens) | {"protocol": protocol, "data_sha256": data}
    return Comparison(formats, details)


def check_precisions(precisions: Sequence[str], device: str) -> None:
    """Refuse precisions that cannot be compared.

    Raises:
        UserError: so it is; the message says why.
    """
    for one in precisions:
        check_precision(one, device)
    if REFERENCE not in precisions:
        raise UserError(f"formats: {REFERENCE} is missing; the other precisions are compared with it")
    if len(set(precisions)) < len(precisions):
        twice = next(one for one in precisions if list(precisions).count(one) > 1)
        raise UserError(f"formats: '{twice}' is given twice")


def schedule_of(training: Any, precision: str) -> Schedule:
    """The same schedule for every precision: rates, batches and their order do not depend on it."""
    sizes = {"tokens": training.tokens, "batch_tokens": training.batch_tokens, "stages": ((training.length, 1.0),)}
    return Schedule(**sizes, peak_lr=training.peak_lr, precision=precision, **SETTINGS)


def _train(
    runs: dict[str, Remote], seed: int, lengths: dict[str, int], windows: Sequence, start: int
) -> dict[str, dict[str, Any]]:
    """One seed: the runs take turns, in an order that turns about. What each of them did, by precision."""
    steps = lengths[REFERENCE]
    found = {
        one: {"before": run("begin", seed), "turns": [], "losses": [], "scales": [], "zeros": [], "lost": []}
        for one, run in runs.items()
    }
    for turn in progress(0, -(-steps // TURN), "training"):
        first = turn * TURN
        for one in list(runs) if turn % 2 == 0 else list(runs)[::-1]:
            count = min(TURN, lengths[one] - first)
            if count > 0:
                done = runs[one]("steps", first, count)
                found[one]["losses"] += done["losses"]
                found[one]["turns"].append((count, done["seconds"]))
                for key, value in (("scales", "scale"), ("zeros", "zeros"), ("lost", "lost")):
                    found[one][key].append((first + count, done[value]))
                found[one] |= {key: done[key] for key in ("peak", "skipped", "cuda_peak")}
    for one, run in runs.items():
        if lengths[one] == steps:
            found[one]["scores"] = run("score", windows, start)
    return found
