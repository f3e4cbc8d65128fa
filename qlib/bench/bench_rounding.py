"""Rounding optimisation of the reference model, block by block: seconds, against auto-round with the same settings."""

from pathlib import Path

import torch

from qlib.bench.rows import Row, judge, missing
from qlib.compress import compress
from qlib.data.calibration import read_calibration
from qlib.errors import UserError
from qlib.evaluate.timing import exclusive
from qlib.models.load import load
from qlib.params import Calibration
from qlib.quantize.tool import Options
from qlib.tools.run import run_tool

__all__ = ["measure"]

BITS, ITERATIONS = 3, 200
NAME, TARGET = f"rounding optimisation, {BITS} bits g128, {ITERATIONS} iterations: speed over auto-round", ">= 3"


def measure(root: Path) -> list[Row]:
    """One run of each: both take longer than noise. How good the results are is in the quality rows."""
    subject = load("reference")
    ids = read_calibration(subject.tokenizer, Calibration(samples=64, length=512), seed=0)
    with exclusive():
        recipe = [{"pass": "signround", "bits": BITS, "group_size": 128, "iterations": ITERATIONS}]
        ours = compress(subject, recipe, ids).details["passes"][0]["seconds"]
        try:
            tool = Options("auto-round", BITS, 128, iterations=ITERATIONS)
            theirs = run_tool(tool, subject.source.folder, torch.cat(ids)).seconds
        except UserError as error:
            return [missing(NAME, TARGET, "times", str(error))]
    how = f"64 x 512 tokens, {torch.get_num_threads()} threads; ours {ours:.1f} s, auto-round {theirs:.1f} s; one run each"
    return [judge(NAME, TARGET, theirs / ours, "times", how)]
