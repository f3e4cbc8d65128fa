"""`qlib predict`: what a recipe will cost on a model, before anything is run."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

__all__ = ["add_command", "prediction_text"]

SUMMARY = "predict sizes, memory and times of a recipe on a model, on this machine or another"
#: Figure -> what it is called, the unit it is printed in, and how large that is.
ROWS = {
    "disk_bytes": ("on disk", "MB", 1e6),
    "resident_bytes": ("in memory, loaded", "MB", 1e6),
    "kv_bytes_per_token": ("key-value cache, a token", "kB", 1e3),
    "compress_peak": ("peak while compressing in memory", "MB", 1e6),
    "stream_peak": ("peak while streaming", "MB", 1e6),
    "compress_seconds": ("compressing in memory", "s", 1.0),
    "prefill_seconds": ("prefill of 256 tokens", "ms", 1e-3),
    "decode_seconds": ("decode, a token", "ms", 1e-3),
}


def add_command(commands: Any, **style: Any) -> None:
    """Add `predict` to the subcommands of `qlib`."""
    parser = commands.add_parser("predict", help=SUMMARY, description=SUMMARY, **style)
    parser.add_argument("--model", required=True, type=_folder, help="name of a shape (qwen-72b, ...), a folder, a hub id")
    parser.add_argument("--recipe", required=True, type=_file, help="a strategy file, or its name")
    parser.add_argument("--device", default="cpu", metavar="{cpu,cuda}", help="of this machine (default: cpu)")
    parser.add_argument("--machine", metavar="FILE", type=_file, help="another machine: a JSON file, or a100-80g")
    context = "before the token that is decoded (default: 256)"
    parser.add_argument("--context", type=int, default=256, metavar="TOKENS", help=context)
    parser.add_argument("--fresh", action="store_true", help="measure this machine again")
    parser.add_argument("--json", action="store_true", help="all figures, and memory by what it is for")
    parser.add_argument("--runs", type=Path, help=argparse.SUPPRESS)
    parser.set_defaults(action=_predict)


def _file(text: str) -> str:
    path = Path(text).expanduser().resolve()
    return str(path) if path.is_file() else text


def _folder(text: str) -> str:
    path = Path(text).expanduser().resolve()
    return str(path) if path.is_dir() else text


def _predict(options: argparse.Namespace, root: Path) -> None:
    from qlib.errors import UserError
    from qlib.predict.anatomy import read_anatomy
    from qlib.predict.machine import read_machine, this_machine
    from qlib.predict.verb import find_strategy, predict

    if options.context < 1:
        raise UserError(f"--context: {options.context} is not allowed; allowed: a whole number of at least 1")
    strategy = find_strategy(options.recipe, root)
    read_anatomy(options.model)  # refused before anything is measured
    machine = read_machine(options.machine) if options.machine else this_machine(options.device, options.fresh)
    found = predict(options.model, strategy, machine, root=root, context=options.context)
    print(json.dumps(asdict(found), indent=1) if options.json else prediction_text(found))


def prediction_text(found: Any) -> str:
    """The figures as lines: value, unit, band, and how it was found; then what fits, and what was not predicted and why."""
    lines = [f"{found.recipe} on {found.model}, {found.machine} ({found.measured})", ""]
    missing = []
    for figure, (words, unit, size) in ROWS.items():
        one = found.figures[figure]
        if one.value is None:
            missing.append(f"  {words}: {one.why}")
            if one.low is None:
                continue
        value = f"at least {_number(one.low / size)}" if one.value is None else _number(one.value / size)
        lines.append(f"  {words:<34}{value:>18} {unit:<4}{_band(one, size)}")
    words = {None: "not known", True: "yes", False: "NO"}
    lines += ["", *(f"  fits: {what}: {words[yes]}" for what, yes in found.fits.items())]
    if missing:
        lines += ["", "not predicted:", *missing]
    lines += ["", f"times and bands: {found.learnt or 'nothing was measured here; run `qlib bench --only predict`'}"]
    return "\n".join(lines)


def _band(one: Any, size: float) -> str:
    if one.value is None:
        return one.method
    if one.low == one.high and one.low is not None:
        return one.method
    if one.low is not None:
        return f"{_number(one.low / size)} to {_number(one.high / size)}"
    return "; ".join(filter(None, (one.method, one.why)))


def _number(value: float) -> str:
    """Three digits at least, none of a fraction that does not matter."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
