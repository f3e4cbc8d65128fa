"""GPTQ to int4 g128 of a model with 107 million parameters, quantization step only: seconds, against three tools."""

import tempfile
from pathlib import Path

import torch

from qlib.bench.rows import Row, judge, missing
from qlib.bench.subjects import MEDIUM, random_model, random_windows
from qlib.compress import compress
from qlib.errors import UserError
from qlib.evaluate.timing import exclusive
from qlib.quantize.tool import Options
from qlib.tools.run import run_tool

__all__ = ["measure"]

#: Tool -> how many times faster we want to be.
TARGETS = {"llm-compressor": 1.5, "gptqmodel": 2.5, "auto-gptq": 3.5}
REPEATS, SAMPLES, LENGTH = 3, 16, 256


def measure(root: Path) -> list[Row]:
    """One row for each tool. Ours and theirs take turns; the interval is from the least to the greatest ratio."""
    windows = torch.cat(random_windows(SAMPLES, LENGTH, MEDIUM["vocab"]))
    theirs: dict[str, list[float]] = {tool: [] for tool in TARGETS}
    failed, ours = {}, []
    with tempfile.TemporaryDirectory() as temporary, exclusive():
        subject = random_model(**MEDIUM)
        subject.model.save_pretrained(temporary)
        subject.tokenizer.save_pretrained(temporary)
        for _ in range(REPEATS):
            ours.append(_seconds(windows))
            for tool in TARGETS:
                try:
                    options = Options(tool, 4, 128, act_order=False, damp=0.01)
                    theirs[tool].append(run_tool(options, Path(temporary), windows).seconds)
                except UserError as error:
                    failed[tool] = str(error)
    how = f"{SAMPLES} x {LENGTH} tokens, {torch.get_num_threads()} threads; ours {_words(ours)}"
    rows = []
    for tool, times in TARGETS.items():
        name, target = f"gptq int4 g128, 107M parameters: speed over {tool}", f">= {times}"
        if tool in failed:
            rows.append(missing(name, target, "times", failed[tool]))
            continue
        ratios = sorted(slow / fast for slow, fast in zip(theirs[tool], ours))
        figure = (ratios[len(ratios) // 2], ratios[0], ratios[-1])
        rows.append(judge(name, target, figure, "times", f"{how}; {tool} {_words(theirs[tool])}"))
    return rows


def _seconds(windows: torch.Tensor) -> float:
    subject = compress(random_model(**MEDIUM), [{"pass": "gptq", "bits": 4, "group_size": 128}], list(windows.split(16)))
    return subject.details["passes"][0]["seconds"]


def _words(seconds: list[float]) -> str:
    return ", ".join(f"{value:.1f}" for value in seconds) + " s"
