"""`qlib bench`: run the benchmarks one after the other, alone on the machine, and write `reports/bench.json`."""

import argparse
import json
import time
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any, Callable, Sequence

from qlib.errors import UserError, nearest
from qlib.paths import write_atomic
from qlib.progress import clock
from qlib.runs.provenance import gpu, provenance
from qlib.tools.environments import environment_of, names

__all__ = ["add_command", "benchmarks", "run_benchmarks", "rows_text"]

SUMMARY = "measure speed and quality side by side with the outside tools that are installed"


def add_command(commands: Any, **style: Any) -> None:
    """Add `bench` to the subcommands of `qlib`."""
    about = "\n".join(f"  {name:<12}{what}" for name, what in benchmarks().items())
    parser = commands.add_parser("bench", help=SUMMARY, description=f"{SUMMARY}\n\n{about}", **style)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="some benchmarks; other rows stay")
    parser.add_argument("--strategies", nargs="+", default=[], metavar="NAME", help="of tools and methods these rows alone; others stay")
    parser.add_argument("--limit", type=float, default=3600, metavar="SECONDS", help="start nothing else after (default: an hour)")
    parser.add_argument("--output", metavar="FILE", help="default: reports/bench.json")
    parser.set_defaults(action=_bench, runs=None)


def _bench(options: argparse.Namespace, root: Path) -> int:
    target = Path(options.output).resolve() if options.output else root / "reports" / "bench.json"
    return run_benchmarks(options.only, target, options.limit, root, options.strategies)


def benchmarks() -> dict[str, str]:
    """Name of every benchmark and the first line of what it says of itself: modules here that begin with ``bench_``."""
    found = {}
    for file in sorted(Path(__file__).parent.glob("bench_*.py")):
        found[file.stem.removeprefix("bench_")] = file.read_text(encoding="utf-8").split('"""')[1].splitlines()[0]
    return found


def run_benchmarks(only: Sequence[str], target: Path, limit: float, root: Path, strategies: Sequence[str] = ()) -> int:
    """Measure and write; rows of benchmarks that were not asked for stay as they are in `target`.

    Args:
        only: names; all if empty. limit: seconds after which no other benchmark is started. strategies: of benchmarks that have
            a row for each strategy, these rows alone; all if empty.

    Returns:
        1 if a target was missed or not measured, else 0.

    Raises:
        UserError: an unknown name; a benchmark without rows for strategies, where some are asked for.
    """
    known = benchmarks()
    for name in only:
        if name not in known:
            raise UserError(f"--only: '{name}' is no benchmark{nearest(name, known)}; allowed: {', '.join(known)}")
        if strategies and not _limited(name):
            raise UserError(f"--strategies: '{name}' has no rows for strategies; name others with --only, such as tools")
    if strategies and not only:
        raise UserError("--strategies: say of which benchmarks, as in --only tools methods")
    files = [file.stem for file in sorted((root / "params").glob("*.yaml"))]
    for name in strategies:
        if name not in files:
            raise UserError(f"--strategies: params/ has no '{name}'{nearest(name, files)}")
    begun, done, skipped = time.perf_counter(), _read(target), set()
    where = provenance() | {"tools": {tool: environment_of(tool, root).version for tool in names(root)}}
    for name in only or known:
        if time.perf_counter() - begun > limit:
            print(f"{name}: not started, the time limit of {limit:.0f} s is over", flush=True)
            continue
        module = import_module(f"qlib.bench.bench_{name}")
        if getattr(module, "NEEDS", "") == "cuda" and not gpu():
            if name in only:
                raise UserError(f"--only: '{name}' needs a GPU that this build of torch can use")
            print(f"{name}: needs a GPU; rows that were measured on one stay\n", flush=True)
            skipped.add(name)
            continue
        print(f"{name}: {known[name]}", flush=True)
        start = time.perf_counter()
        if _limited(name):
            rows, late = module.measure(root, _turns(begun + limit, strategies))
            kept = [row for row in done.get(name, []) if set(late) & set(row["facts"].get("strategies", ()))]
            why = "not asked for:" if strategies else f"its time limit, {clock(limit)}, was over before"
            rows += not_reached(name, late, kept, why)
        else:
            rows, kept = module.measure(root), []
        done[name] = [asdict(row) | {"benchmark": name, "provenance": where} for row in rows] + kept
        print(rows_text(done[name]), f"{name}: {time.perf_counter() - start:.0f} s\n", sep="\n", flush=True)
        write_atomic(target, json.dumps([row for one in known for row in done.get(one, [])], indent=1) + "\n")
    print(target)
    asked = [name for name in only or known if name not in skipped]
    found = [row for name in asked for row in done.get(name, [{"met": None, "target": "any", "measured": None}])]
    return int(any(row["met"] is not True for row in found if row["target"] or row["measured"] is None))


def _limited(name: str) -> bool:
    """Whether a benchmark has rows for each strategy, of which it may leave out some."""
    return getattr(import_module(f"qlib.bench.bench_{name}"), "LIMITED", False)


def _turns(end: float, strategies: Sequence[str]) -> Callable[[Sequence[str]], bool]:
    """Whether it is the turn of strategies that are measured together: some were asked for, and `end` has not come."""
    return lambda names: time.perf_counter() < end and (not strategies or not set(strategies).isdisjoint(names))


def not_reached(name: str, late: Sequence[str], kept: Sequence[dict], why: str) -> list[Any]:
    """One row for all strategies that were left out and of which no earlier rows are kept; `why` goes before their names."""
    from qlib.bench.rows import missing  # brings torch, which listing the commands does without

    earlier = {strategy for row in kept for strategy in row["facts"]["strategies"]}
    late = [strategy for strategy in late if strategy not in earlier]
    return [missing(f"{name}: {len(late)} more strategies", ">= 1", "times", f"{why} {', '.join(late)}")] if late else []


def _read(target: Path) -> dict[str, list[dict]]:
    done: dict[str, list[dict]] = {}
    if target.is_file():
        for row in json.loads(target.read_text(encoding="utf-8")):
            done.setdefault(row["benchmark"], []).append(row)
    return done


def rows_text(rows: Sequence[dict]) -> str:
    """One line for each row: met or not, measured figure with interval, target, name."""
    words = {True: "met", False: "MISSED", None: "not resolved"}
    lines = []
    for row in rows:
        figure = "-" if row["measured"] is None else f"{row['measured']:.3g} ({row['low']:.3g} to {row['high']:.3g})"
        word = (words[row["met"]] if row["target"] else "") if row["measured"] is not None else "not measured"
        lines.append(f"  {word:<13}{figure:<26}{row['target']:<9}{row['unit']:<9}{row['name']}")
    return "\n".join(lines)
