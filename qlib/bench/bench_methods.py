"""Time to compress 107 million parameters, of every tool against our pass of the same method and bits.

Quantization steps alone. GPTQ and SignRound of the tools known for them have benchmarks of their own (gptq, rounding).
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from qlib.bench.bench_gptq import LENGTH, SAMPLES
from qlib.bench.bench_tools import settings_of
from qlib.bench.rows import Row, judge, missing
from qlib.bench.subjects import MEDIUM, random_model, random_windows
from qlib.compress import compress
from qlib.errors import UserError
from qlib.evaluate.timing import exclusive
from qlib.progress import clock
from qlib.quantize.tool import Options
from qlib.tools.run import run_tool

__all__ = ["OURS", "measure"]

#: Method, as adapters call it -> our pass. A method that is not here has no counterpart.
OURS = {
    "RTN": [{"pass": "rtn"}],
    "GPTQ": [{"pass": "gptq"}],
    "AWQ": [{"pass": "awq"}, {"pass": "rtn"}],
    "HQQ": [{"pass": "hqq"}],
}
ELSEWHERE = {"auto-gptq", "gptqmodel", "llm-compressor"}  # benchmark gptq
REPEATS, LIMIT = 3, 300.0  # runs; seconds that one run of a tool may take
#: Says that `measure` asks whether it is the turn of strategies, and names those it left out.
LIMITED = True


def measure(root: Path, turn: Callable[[Sequence[str]], bool]) -> tuple[list[Row], list[str]]:
    """One row for each setting of a tool whose method we have, and the strategies that were left out.

    The interval is from the least to the greatest ratio.
    """
    begun, windows = time.perf_counter(), torch.cat(random_windows(SAMPLES, LENGTH, MEDIUM["vocab"]))
    rows, late = [], []
    with tempfile.TemporaryDirectory() as temporary, exclusive():
        subject = random_model(**MEDIUM)
        subject.model.save_pretrained(temporary)
        subject.tokenizer.save_pretrained(temporary)
        _load_kernels()
        for options, names in settings_of(root, by="method"):
            if options.method not in OURS or options.name in ELSEWHERE:
                continue
            if not turn(names):
                late += names
                continue
            print(f"  {names[0]}, after {clock(time.perf_counter() - begun)}", flush=True)
            rows.append(_row(options, names, Path(temporary), windows))
    return rows, late


def _row(options: Options, names: list[str], folder: Path, windows: torch.Tensor) -> Row:
    title = f"107M parameters, {options.method} of {options.bits} bits: speed over {names[0].removeprefix('tool-')}"
    facts = {"strategies": names, "method": options.method}
    theirs, mine = [], []
    try:
        for _ in range(REPEATS):
            theirs.append(run_tool(options, folder, windows, limit=LIMIT).seconds)
            mine.append(_seconds(options, windows))
    except UserError as error:
        why = str(error).splitlines()[0][:300]
        return replace(missing(title, ">= 1", "times", why), facts=facts | {"error": why})
    ratios = sorted(slow / fast for slow, fast in zip(theirs, mine))
    words = "; ".join(f"{who} {', '.join(f'{one:.3g}' for one in spent)} s" for who, spent in (("ours", mine), ("its", theirs)))
    how = f"{words}; {SAMPLES} x {LENGTH} tokens, {torch.get_num_threads()} threads"
    figure = (ratios[len(ratios) // 2], ratios[0], ratios[-1])
    return replace(judge(title, ">= 1", figure, "times", how), facts=facts)


def _load_kernels() -> None:
    """Built, if they are not, and loaded: or else the first run of the first row would pay for it."""
    compress(random_model(**MEDIUM), [{"pass": "rtn", "bits": 4}], None)


def _seconds(options: Options, windows: torch.Tensor) -> float:
    """Our pass of the method, with the same bits, group and symmetry."""
    grid = {name: getattr(options, name) for name in ("bits", "group_size", "symmetric")}
    *before, last = OURS[options.method]
    subject = compress(random_model(**MEDIUM), [*before, last | grid], list(windows.split(16)))
    return sum(one["seconds"] for one in subject.details["passes"])
