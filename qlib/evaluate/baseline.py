"""The uncompressed model's answers, computed once for a model, data and protocol, and kept as an artefact."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Sequence

import numpy as np
import torch

from qlib.evaluate.items import Item
from qlib.evaluate.logits import ModelLogits
from qlib.evaluate.precision import in_float32
from qlib.evaluate.quality import SCORER, log_probabilities, score_items, score_windows
from qlib.models.load import Subject, load
from qlib.paths import cache_folder

__all__ = ["Answers", "Shown", "answer", "baseline_answers", "divergence", "weights_hash"]


@dataclass(frozen=True)
class Answers:
    """What a model says about the evaluation data.

    Attributes:
        inside, alone: log-likelihood of each option behind its context, and alone `[items, options]`.
        nll, tokens: per window `[windows]`.
    """

    inside: np.ndarray
    alone: np.ndarray
    nll: np.ndarray
    tokens: np.ndarray


@dataclass(frozen=True)
class Shown:
    """The baseline's distributions: log-probabilities in fp16 `[tokens, vocabulary]`, and its first choice `[tokens]`."""

    log_p: np.ndarray
    top: np.ndarray


def answer(subject: Subject, items: Sequence[Item], windows: Sequence[Sequence[int]], start: int) -> Answers:
    """Score items and windows in fp32."""
    logits_of = ModelLogits(subject.model)
    with in_float32(subject.model):
        inside, alone = score_items(logits_of, items, start)
        scores = score_windows(logits_of, windows, start)
    return Answers(inside, alone, scores.nll, scores.tokens)


def weights_hash(folder: Path) -> str:
    """SHA-256 over configuration and weights of a model folder."""
    digest = hashlib.sha256()
    for file in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def baseline_answers(
    subject: Subject,
    items: Sequence[Item],
    windows: Sequence[Sequence[int]],
    shown: Sequence[Sequence[int]],
    start: int,
    protocol: dict[str, Any],
) -> tuple[Answers, "Shown"]:
    """Answers of the uncompressed bf16 model, and its distributions on the windows `shown`.

    Loads the model again from where the subject came from, unless the artefact is there already: one for each
    protocol, version of the scorer, kind of device, and version of torch. The log-probabilities are opened
    memory-mapped, so that a large vocabulary costs disk and not memory.
    """
    protocol = protocol | {"scorer": SCORER, "device": subject.model.device.type, "torch": torch.__version__}
    key = hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_folder() / "baseline" / key
    if not (folder / "answers.npz").exists():
        folder.mkdir(parents=True, exist_ok=True)
        fresh = load(subject.source.name, str(subject.model.device), subject.source.revision)
        answers = answer(fresh, items, windows, start)
        logits_of = ModelLogits(fresh.model)
        with in_float32(fresh.model):
            pairs = [(row.half().cpu(), row.argmax(-1).cpu()) for row in log_probabilities(logits_of, shown, start)]
        first, top = (torch.cat(parts).numpy() for parts in zip(*pairs))
        _save(folder / "shown.npy", lambda file: np.save(file, first))
        _save(folder / "top.npy", lambda file: np.save(file, top))
        _save(folder / "answers.npz", lambda file: np.savez(file, **vars(answers)))
    with np.load(folder / "answers.npz", allow_pickle=False) as stored:
        answers = Answers(**{name: stored[name] for name in stored.files})
    log_p = np.load(folder / "shown.npy", mmap_mode="r", allow_pickle=False)
    return answers, Shown(log_p, np.load(folder / "top.npy", allow_pickle=False))


def _save(path: Path, write) -> None:
    partial = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    with partial.open("wb") as file:
        write(file)
    os.replace(partial, path)


@torch.inference_mode()
def divergence(
    subject: Subject, shown: Sequence[Sequence[int]], reference: Shown, start: int
) -> tuple[np.ndarray, np.ndarray]:
    """KL divergence from the baseline in nats, and whether both rank the same token first: `[tokens]` each."""
    logits_of, at = ModelLogits(subject.model), 0
    kl, agree = [], []
    with in_float32(subject.model):
        for ours in log_probabilities(logits_of, shown, start):
            part = slice(at, at + len(ours))
            theirs = torch.from_numpy(np.array(reference.log_p[part])).float().log_softmax(-1).to(ours.device)
            kl.append((theirs.exp() * (theirs - ours)).sum(-1).clamp(min=0).cpu())
            agree.append(ours.argmax(-1).cpu() == torch.from_numpy(reference.top[part]))
            at += len(ours)
    return torch.cat(kl).double().numpy(), torch.cat(agree).double().numpy()
