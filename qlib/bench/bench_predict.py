"""Predictions of `qlib predict` against what small and middle shapes really take; leaves what was measured to be fitted to.

Every shape is predicted from the runs of all others (times), or by counting alone (memory, bytes on disk). The runs and
the rates of the machine go to `reports/predict.json`, which `qlib predict` reads.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qlib.bench.predict_runs import Job, apart
from qlib.bench.rows import Row, judge, missing
from qlib.evaluate import parts
from qlib.evaluate.fastest import PlainLinear, fastest_form
from qlib.evaluate.roofline import copies_needed, last_level_cache
from qlib.evaluate.timing import exclusive, time_rounds
from qlib.models.shapes import Shape
from qlib.paths import write_atomic
from qlib.predict.anatomy import read_anatomy
from qlib.predict.experience import RUNS, Experience, learn, outcome_of
from qlib.predict.machine import Machine, this_machine
from qlib.predict.sizes import disk_bytes
from qlib.progress import progress

__all__ = ["measure", "SHAPES", "FORMATS", "JOBS", "time_tokens", "lower_of", "judge_figures", "run_jobs", "as_run"]

CPU = torch.device("cpu")
PROMPT = CONTEXT = 256
PASSES, ROUNDS, VOCAB = 2, 7, 4096


def _shape(layers: int, hidden: int, ffn: int) -> Shape:
    return Shape(f"{layers} x {hidden}", layers, hidden, hidden // 64, hidden // 64, ffn, VOCAB, tied=True, head_dim=64)


#: Shapes, and tokens of calibration text on each.
SHAPES = {
    _shape(8, 512, 1408): 8192, _shape(4, 768, 2048): 2048, _shape(4, 1024, 2816): 4096, _shape(2, 1536, 4096): 8192,
    _shape(2, 2048, 5632): 4096,
}  # fmt: skip
#: Formats whose tokens are timed, and a recipe that leaves them.
FORMATS: dict[str, list[dict[str, Any]]] = {
    "bf16": [],
    "int8": [{"pass": "rtn", "bits": 8, "group_size": None}],
    "int8-a8": [{"pass": "rtn", "bits": 8, "group_size": None, "symmetric": True, "activations": "int8"}],
    "int4-g128": [{"pass": "rtn", "bits": 4}],
    "int3-g128": [{"pass": "rtn", "bits": 3}],
}
#: Recipes that are timed, and how much memory they take.
RECIPES: dict[str, list[dict[str, Any]]] = {
    "rtn-int4": FORMATS["int4-g128"], "gptq-int4": [{"pass": "gptq", "bits": 4}], "gptq-int3": [{"pass": "gptq", "bits": 3}],
    "hqq-int4": [{"pass": "hqq", "bits": 4}], "magnitude": [{"pass": "magnitude"}], "wanda": [{"pass": "wanda"}],
    "sparsegpt": [{"pass": "sparsegpt"}], "joint-int4": [{"pass": "joint", "bits": 4}],
    "smooth-w8a8": [{"pass": "smooth"}, *FORMATS["int8-a8"]], "rtn-int4-mse": [{"pass": "rtn", "bits": 4, "clip": "mse"}],
    "awq-int4": [{"pass": "awq", "steps": 3}, {"pass": "rtn", "bits": 4}],
    "signround-int4": [{"pass": "signround", "bits": 4, "iterations": 10}],
    "int4-ends-int8": [{"pass": "rtn", "bits": 4}, {"pass": "ends"}],
}  # fmt: skip
#: Searches that take long, and what is no different on large shapes: on the smaller ones alone.
SOME, SMALL = ("awq-int4", "signround-int4", "rtn-int4-mse", "int4-ends-int8"), 1024
STREAMED = ("rtn-int4", "gptq-int4", "wanda")
#: Figure -> what its rows call it.
FIGURES = {
    "decode_seconds": "decode time", "prefill_seconds": "prefill time", "compress_seconds": "compress time",
    "compress_peak": "peak memory", "stream_peak": "peak memory of a stream", "disk": "bytes on disk",
}  # fmt: skip
BOUND, LEAST, ENOUGH = 0.15, 5, 10
TARGET = f"<= {BOUND}"

JOBS = {
    f"{recipe} on {shape.name}{', streamed' * streamed}": Job(shape, RECIPES[recipe], tokens, streamed=streamed)
    for recipe in RECIPES  # all shapes one after the other: an hour in which a shared machine is slow is no shape's alone
    for shape, tokens in SHAPES.items()
    for streamed in ((False, True) if recipe in STREAMED else (False,))
    if shape.hidden <= SMALL or recipe not in SOME
}


def measure(root: Path) -> list[Row]:
    """Three rows for each figure: the median and the worst of the errors, and how many pairs keep the bound."""
    machine = this_machine(fresh=True)
    with exclusive():
        timed = lower_of([{shape: time_tokens(shape) for shape in SHAPES} for _ in range(PASSES)])
        runs = [
            as_run(f"{format} on {shape.name}", shape, FORMATS[format], one)
            for shape, found in timed.items()
            for format, one in found.items()
        ]
        runs += run_jobs(JOBS)
    write_atomic(root / RUNS, json.dumps(asdict(replace(machine, runs=runs, disk_bytes=None)), indent=1) + "\n")
    return judge_figures(learn(machine, runs), runs, machine)


def lower_of(passes: Sequence[dict[Shape, dict[str, dict[str, float]]]]) -> dict[Shape, dict[str, dict[str, float]]]:
    """The least time of each figure: others on the machine only add to it."""

    def least(shape: Shape, format: str, figure: str) -> float:
        return min(one[shape][format][figure] for one in passes)

    return {
        shape: {format: {figure: least(shape, format, figure) for figure in figures} for format, figures in found.items()}
        for shape, found in passes[0].items()
    }


def run_jobs(jobs: dict[str, Job]) -> list[dict[str, Any]]:
    """Every job in a process of its own."""
    runs, names = [], list(jobs)
    for index in progress(0, len(names), "measuring runs"):
        job = apart(jobs[names[index]])
        runs.append(as_run(names[index], job.shape, job.recipe, job.measured, job.tokens, job.length))
    return runs


def as_run(
    name: str, shape: Shape, recipe: list[dict[str, Any]], measured: dict[str, float], tokens: int = 0, length: int = 0
) -> dict[str, Any]:
    """A run as `qlib.predict.experience` reads it."""
    told = {"tokens": tokens, "length": length, "prompt": PROMPT, "context": CONTEXT}
    return {"name": name, "shape": asdict(shape), "recipe": recipe, "measured": measured} | told


@torch.inference_mode()
def time_tokens(shape: Shape, formats: Sequence[str] = tuple(FORMATS), rounds: int = ROUNDS) -> dict[str, dict[str, float]]:
    """Format -> seconds of a token, and of a prompt: layers x one layer + head, as the speed records have it."""
    found: dict[str, dict[str, float]] = {format: {} for format in formats}
    random = torch.Generator().manual_seed(0)
    for phase, new, context in (("decode", 1, CONTEXT), ("prefill", PROMPT, 0)):
        form, _ = fastest_form(parts.random_tensor(shape.linears["mlp.gate_proj"], CPU, random), new)
        copies = copies_needed([parts.layer_bytes(shape, format, context + new) for format in formats], last_level_cache(CPU))
        calls = {}
        for format in formats:
            layers = [parts.build_layer(shape, format, form, CPU, random)[0]]
            parts.add_copies(layers, copies)
            work = parts.Workload(shape, new, context, CPU, random)
            calls[format] = [partial(work.run, layer) for layer in layers]
        x = parts.random_tensor((1, 1, shape.hidden), CPU, random, scale=1.0)
        heads = [parts.build_head(shape, PlainLinear, CPU, random) for _ in range(copies)]
        times = time_rounds(calls | {"head": [partial(head, x) for head in heads]}, rounds, CPU).rounds
        for format in formats:
            seconds = np.median(shape.layers * times[format] + times["head"]) / 1e3
            found[format][f"{phase}_seconds"] = float(seconds)
    return found


def judge_figures(learnt: Experience, runs: list[dict[str, Any]], machine: Machine) -> list[Row]:
    """Median and worst relative error of each figure over what was held out, and how many pairs are within `BOUND`."""
    pairs = learnt.pairs | {"disk": [_disk(run) for run in runs if "disk" in run["measured"]]}
    rows = []
    for figure, what in FIGURES.items():
        found = pairs.get(figure, [])
        errors = sorted((abs(predicted / measured - 1), name) for name, measured, predicted in found)
        names = [f"predict: {which} relative error of {what}" for which in ("median", "worst")]
        count = f"predict: pairs within {BOUND:.0%} of {what}", f">= {ENOUGH}"
        if len(errors) < LEAST:
            few = f"{len(errors)} pairs were held out"
            rows += [missing(name, TARGET, "fraction", few) for name in names] + [missing(*count, "pairs", few)]
            continue
        over = f"{len(errors)} pairs of shape and recipe, each shape predicted from the others"
        if figure.endswith("peak"):
            beyond = [abs(p - m) / (m - machine.process_bytes) for _, m, p in found]
            empty = f"the {machine.process_bytes / 1e6:.0f} MB of an empty process"
            over += f"; median {np.median(beyond):.2f} of what is beyond {empty}"
        worst, name = errors[-1]
        rows.append(judge(names[0], TARGET, float(np.median([error for error, _ in errors])), "fraction", over))
        rows.append(judge(names[1], TARGET, worst, "fraction", f"{over}; the worst: {name}"))
        within = sum(error <= BOUND for error, _ in errors)
        rows.append(judge(*count, within, "pairs", over))
    return rows


def _disk(run: dict[str, Any]) -> tuple[str, float, float]:
    anatomy = read_anatomy(Shape(**run["shape"]))
    return run["name"], run["measured"]["disk"], disk_bytes(outcome_of(anatomy, run["recipe"]))
