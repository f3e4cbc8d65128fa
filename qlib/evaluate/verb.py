"""Measure the quality of a subject: accuracy, perplexity, bits per byte, and item by item against the baseline."""

from dataclasses import asdict, dataclass, field
from typing import Any, Sequence

import numpy as np

from qlib.data.source import hash_documents, read_documents
from qlib.data.tokenizer import cut_places, encode_once, start_token
from qlib.evaluate.baseline import Shown, answer, baseline_answers, divergence, weights_hash
from qlib.evaluate.items import LEVELS, build_items, cut_windows
from qlib.evaluate.statistics import ratio_interval, resample
from qlib.evaluate.tally import BOOTSTRAP, Tally, measured
from qlib.models.load import Subject
from qlib.models.packed import coded_modules
from qlib.record import Measurement

__all__ = ["Quality", "evaluate"]

SHOWN_TOKENS = 10_000  # tokens whose whole distribution is compared with the baseline's


@dataclass
class Quality:
    """What `evaluate` found.

    Attributes:
        measurements: under the record's fixed names.
        details: what else belongs into the record: the protocol line, hashes, accuracy by level, and under "items"
            the arrays that paired statistics need.
    """

    measurements: dict[str, Measurement]
    details: dict[str, Any] = field(default_factory=dict)


def evaluate(subject: Subject, evaluation: Any, against: str | None = "baseline", seed: int = 0) -> Quality:
    """Score `subject` on held-out text.

    Args:
        evaluation: has ``text``, ``documents``, ``length``, ``items``, ``tasks``, ``task_limit``, ``bootstrap``.
        against: "baseline" adds divergence, agreement and paired differences; None measures the baseline itself.
        seed: draws items and resamples.

    Raises:
        UserError: the text is missing, differs from its manifest or is too short.
    """
    documents = read_documents(evaluation.text, "evaluation")
    if evaluation.documents is not None:
        documents = documents[: evaluation.documents]
    ids = encode_once(subject.tokenizer, [document.text for document in documents])
    start = start_token(subject.tokenizer)
    items = build_items(ids, cut_places(subject.tokenizer), seed, evaluation.items)
    windows = cut_windows(ids, evaluation.length)
    texts, shown = [window for _, window in windows], _shown(windows)
    data, weights = hash_documents(evaluation.text, documents), weights_hash(subject.source.folder)
    protocol = {"data": data, "weights": weights, "seed": seed, "start": start, "levels": str(LEVELS)}
    base, reference = baseline_answers(
        subject, items, texts, [window for _, window in shown], start, protocol | asdict(evaluation)
    )
    own = answer(subject, items, texts, start) if against else base
    tally = Tally(items, windows, own, base, resample(len(documents), evaluation.bootstrap, seed))
    found = tally.measurements(_bytes(subject.tokenizer, texts))
    if against:
        found |= tally.against_baseline() | _divergence(subject, shown, reference, start, tally.draws)
    details = {
        "protocol": _protocol_line(evaluation, data, len(documents), texts, len(items), seed),
        "data_sha256": data,
        "subject": _describe(subject, weights),
        "items": tally.arrays(),
        "levels": tally.levels(),
        "headline_level": LEVELS[tally.headline].name,
    }
    if evaluation.tasks:
        from qlib.evaluate.harness import run_tasks

        found |= run_tasks(subject, evaluation.tasks, evaluation.task_limit, seed)
    return Quality(found, details)


def _shown(windows: Sequence[tuple[int, list[int]]]) -> list[tuple[int, list[int]]]:
    """Windows, spread evenly, that hold about `SHOWN_TOKENS` tokens together."""
    count = max(1, min(len(windows), SHOWN_TOKENS // max(len(windows[0][1]), 1)))
    return [windows[i] for i in np.linspace(0, len(windows) - 1, count).round().astype(int)]


def _bytes(tokenizer: Any, texts: Sequence[list[int]]) -> int:
    """UTF-8 bytes of the scored text (a character cut by a window's edge counts as its replacement)."""
    return sum(len(text.encode("utf-8")) for text in tokenizer.batch_decode(texts, clean_up_tokenization_spaces=False))


def _divergence(subject: Subject, shown, reference: Shown, start: int, draws: np.ndarray) -> dict[str, Measurement]:
    kl, agree = divergence(subject, [window for _, window in shown], reference, start)
    owner = np.concatenate([np.full(len(window), number) for number, window in shown])
    documents = draws.shape[1]
    counts = np.bincount(owner, minlength=documents)

    def mean(values: np.ndarray, unit: str, factor: float) -> Measurement:
        totals = np.bincount(owner, values, minlength=documents)
        triple = ratio_interval(totals, counts, draws, lambda share: factor * share)
        return measured(triple, unit, len(values), f"mean over tokens against the bf16 baseline; {BOOTSTRAP}")

    return {
        "quality.kl": mean(kl, "nats", 1),
        "quality.kl_p99": Measurement(float(np.quantile(kl, 0.99)), "nats", len(kl), method="99th percentile of tokens"),
        "quality.top1_agreement": mean(agree, "percent", 100),
    }


def _protocol_line(evaluation: Any, data: str, documents: int, texts: Sequence[list[int]], items: int, seed: int) -> str:
    return (
        f"data {evaluation.text} {data[:12]}, evaluation split, {documents} documents, {sum(map(len, texts))} tokens; "
        f"context {evaluation.length}, windows do not overlap, start token before each; {items} items of four choices; "
        f"per token, fp32, seed {seed}"
    )


def _describe(subject: Subject, weights: str) -> dict[str, Any]:
    coded = coded_modules(subject.model).values()
    parameters = sum(p.numel() for p in subject.model.parameters())
    parameters += sum(module.in_features * module.out_features for module in coded)
    source = subject.source
    return {"source": source.name, "revision": source.revision, "weights_sha256": weights, "parameters": parameters}
