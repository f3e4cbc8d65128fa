"""The door to lm-evaluation-harness: hub tasks by name, or a task file of one's own."""

import random
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator, Sequence

import numpy as np
import torch

from qlib.errors import UserError, nearest
from qlib.evaluate.precision import in_float32
from qlib.models.load import Subject
from qlib.record import Measurement

__all__ = ["run_tasks"]

#: A task's figure is the first of these that it reports.
METRICS = ("acc", "exact_match", "acc_norm", "pass@1", "f1")


def run_tasks(
    subject: Subject, tasks: Sequence[str], limit: int | None = None, seed: int = 0
) -> dict[str, Measurement]:
    """Evaluate `subject` on tasks of lm-evaluation-harness, in fp32 like everything else.

    Args:
        tasks: names that the harness knows (``arc_easy``), or paths of task files (``mine.yaml``).
        limit: items of each task; None: all.

    Returns:
        ``task.NAME`` -> percent, with 1.96 standard errors as its interval.

    Raises:
        UserError: the harness knows no such task, its data cannot be had, or the model has a quantized key-value cache,
            through which the harness does not read.
    """
    if getattr(subject.model.config, "kv_cache", None):
        raise UserError("evaluation.tasks: lm-evaluation-harness does not read through the model's quantized kv_cache")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    files = [Path(task) for task in tasks if task.endswith((".yaml", ".yml"))]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise UserError(f"evaluation.tasks: {missing[0]} does not exist")
    folders = [str(file.resolve().parent) for file in files]
    manager = TaskManager(include_path=folders or None, include_defaults=len(files) < len(tasks))
    names = [_name_in(Path(task)) if Path(task) in files else task for task in tasks]
    for name in names:
        if name not in manager.all_tasks:
            raise UserError(f"evaluation.tasks: '{name}' is unknown to lm-evaluation-harness{nearest(name, manager.all_tasks)}")
    with in_float32(subject.model), keep_rng_state():
        wrapped = HFLM(pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=8)
        seeds = dict(random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed)
        try:
            found = simple_evaluate(wrapped, tasks=names, limit=limit, task_manager=manager, log_samples=False, **seeds)
        except (OSError, ConnectionError) as error:
            raise UserError(f"evaluation.tasks: the data of {', '.join(names)} cannot be had: {error}") from None
    return {f"task.{name}": _figure(found, name, limit) for name in names}


def _name_in(file: Path) -> str:
    """The ``task:`` of a task file."""
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("task:"):
            return line.partition(":")[2].strip()
    raise UserError(f"{file}: has no 'task:' line")


def _figure(found: dict[str, Any], name: str, limit: int | None) -> Measurement:
    results = found["results"][name]
    metrics = {key.partition(",")[0]: key for key in results if "," in key and "stderr" not in key}
    metric = next((metric for metric in METRICS if metric in metrics), None)
    if metric is None:
        raise UserError(f"evaluation.tasks: '{name}' reports none of {', '.join(METRICS)}")
    key = metrics[metric]
    value = 100 * results[key]
    error = results.get(key.replace(",", "_stderr,", 1))
    spread = 196 * error if isinstance(error, float) else None
    return Measurement(
        value,
        "percent",
        found.get("n-samples", {}).get(name, {}).get("effective"),
        None if spread is None else value - spread,
        None if spread is None else value + spread,
        f"lm-evaluation-harness, {metric}, 1.96 standard errors",
        f"version {found.get('versions', {}).get(name)}, {found.get('n-shot', {}).get(name)}-shot"
        + (f", first {limit} items" if limit else ""),
    )


@contextmanager
def keep_rng_state() -> Iterator[None]:
    """The harness seeds the global generators; give the caller back what it had."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
