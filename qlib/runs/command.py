"""`qlib run`: run strategies and lessons that are out of date."""

import argparse
import hashlib
import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from qlib.arguments import add_runs, file_or_name, folder_or_id, strategy_files
from qlib.errors import UserError, nearest
from qlib.params import SHAPES_ONLY, TIERS, Strategy, check_notebook, load_strategies, override
from qlib.runs.lessons import find_lessons, taught
from qlib.runs.provenance import torch_device
from qlib.yamltext import parse_assignments

__all__ = ["add_command"]

SUMMARY = "run strategies and lessons that are out of date"
#: A run of nobody's interest any more should not hold the machine for days.
LIMIT = 4 * 3600.0


def add_command(commands: Any, **style: Any) -> None:
    """Add `run` to the subcommands of `qlib`."""
    run = commands.add_parser("run", help=SUMMARY, description=SUMMARY, **style)
    add_runs(run)
    run.add_argument(
        "files", nargs="*", metavar="FILE", type=file_or_name,
        help="files or names (default: all of the tier, with the lessons on its families)",
    )  # fmt: skip
    run.add_argument("-p", dest="changes", action="append", default=[], metavar="KEY=VALUE", help="other parameters")
    run.add_argument("--model", type=folder_or_id, help="another model: a folder or a hub id; apart from others, no lessons")
    run.add_argument("--tier", choices=TIERS, help="smoke, core (default), full, which includes core, or gpu")
    run.add_argument("--force", action="store_true", help="run also what is up to date")
    run.add_argument("--limit", type=_seconds, default=LIMIT, metavar="SECONDS", help="per strategy (default: 4 hours)")
    run.add_argument("--device", choices=("cpu", "cuda"), help="where to compute (default: cpu)")
    run.set_defaults(action=_run)


def _seconds(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds above 0")
    return value


def _run(options: argparse.Namespace, root: Path) -> int:
    from qlib.runs.runner import Job, run_all

    for ending in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, _interrupt)
    if options.device:
        os.environ["QLIB_DEVICE"] = options.device
    if options.changes and not options.files:
        raise UserError("-p: name the strategies that it is for, e.g. qlib run rtn-int4 -p seed=1")
    lessons = find_lessons(root)
    named, chosen = _split(options.files, lessons, root)
    files = strategy_files(named, root) if named or not options.files else []
    strategies = load_strategies(files, root)
    changes = parse_assignments(options.changes)
    if changes and chosen:
        raise UserError(f"-p: {chosen[0].name} is a lesson, which is not run with other parameters")
    jobs = []
    for file, strategy in zip(files, strategies):
        if not _chosen(strategy, options):
            continue
        if options.model:
            strategy = override(strategy, {"model": options.model}, "--model")
        if changes:
            strategy = _renamed(override(strategy, changes), changes)
            check_notebook(strategy, root, "-p")
        jobs.append(Job(strategy, file))
    if options.model:
        chosen = [replace(lesson, model=options.model) for lesson in chosen]
    elif not options.files and options.tier != "smoke":
        families = {job.strategy.family for job in jobs}
        chosen = [lesson for lesson in lessons if taught(lesson) in families]
    jobs += [Job(lesson, root / "notebooks" / lesson.notebook) for lesson in chosen]
    if torch_device() == "cpu" and (lost := [job.strategy.name for job in jobs if job.strategy.tier == "gpu"]):
        raise UserError(f"{lost[0]}: strategies of tier gpu need one; allowed: --device cuda")
    if not jobs:
        raise UserError(f"no strategy of tier {options.tier or 'core'} to run; see `qlib list`")
    return run_all(jobs, root, options.runs, options.force, options.limit)


def _interrupt(*_: Any) -> NoReturn:
    raise KeyboardInterrupt


def _split(given: list[str], lessons: list[Strategy], root: Path) -> tuple[list[str], list[Strategy]]:
    """Tell the lessons, given by path or name, from the strategies."""
    known = {lesson.name: lesson for lesson in lessons}
    known |= {str(root / "notebooks" / lesson.notebook): lesson for lesson in lessons}
    rest = [name for name in given if name not in known]
    for name in rest:
        if name.startswith("lesson-") and not (root / "params" / f"{name}.yaml").is_file():
            raise UserError(f"{name}: no such lesson{nearest(name, known)}; see `qlib list`")
        if name.endswith(".ipynb"):
            raise UserError(f"{name}: is no lesson; allowed: strategy files (params/*.yaml), notebooks/lessons/*.ipynb")
    return rest, [known[name] for name in dict.fromkeys(given) if name in known]


def _chosen(strategy: Strategy, options: argparse.Namespace) -> bool:
    if options.model and strategy.family in SHAPES_ONLY and not options.files:
        return False  # its model is the name of a shape
    if options.files and not options.tier:
        return True
    tier = options.tier or "core"
    return strategy.tier == tier or (tier == "full" and strategy.tier == "core")


def _renamed(strategy: Strategy, changes: dict[str, Any]) -> Strategy:
    """A name of its own, so that the run does not take the place of the published strategy."""
    digest = hashlib.sha256(json.dumps(changes, sort_keys=True).encode()).hexdigest()[:8]
    return replace(strategy, name=f"{strategy.name}+{digest}")
