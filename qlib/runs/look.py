"""`qlib list` and `qlib show`: the state of strategies, and the figures of one."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from qlib.arguments import add_runs, folder_or_id, strategy_files
from qlib.params import SHAPES_ONLY, TIERS, Strategy, load_strategies
from qlib.runs.lessons import find_lessons
from qlib.runs.provenance import torch_device

__all__ = ["add_commands"]

LIST = "list strategies and lessons, their state and last figures"
SHOW = "show the record of one strategy, or the state of a lesson"


def add_commands(commands: Any, **style: Any) -> None:
    """Add `list` and `show` to the subcommands of `qlib`."""
    listed = commands.add_parser("list", help=LIST, description=LIST, **style)
    add_runs(listed)
    listed.add_argument("--tier", choices=TIERS, help="only these (default: core and full)")
    listed.add_argument("--model", type=folder_or_id, help="runs of another model")
    listed.add_argument("--why", action="store_true", help="say which change made it out of date, and what failed")
    listed.set_defaults(action=_list)

    show = commands.add_parser("show", help=SHOW, description=SHOW, **style)
    add_runs(show)
    show.add_argument("name", metavar="NAME")
    show.add_argument("--model", type=folder_or_id, help="its record on another model")
    show.add_argument("--json", action="store_true", help="the whole record, with the figures of its shape")
    show.set_defaults(action=_show)


def _list(options: argparse.Namespace, root: Path) -> None:
    from qlib.runs.listing import list_rows, overridden, table

    strategies = load_strategies(strategy_files([], root), root)
    # Smoke strategies run in a folder of their own and say nothing about a model; those of tier gpu need one.
    apart = ("smoke", "gpu") if torch_device() == "cpu" else ("smoke",)
    strategies = [s for s in strategies if (s.tier == options.tier if options.tier else s.tier not in apart)]
    if options.model:
        strategies = [replace(s, model=options.model) for s in strategies if s.family not in SHAPES_ONLY]
    strategies += overridden(options.runs, strategies)
    if options.tier != "smoke":
        strategies += _lessons_to_list(options, root)
    rows = list_rows(strategies, root, options.runs)
    if not options.why:
        print(table([row for row, _ in rows]))
        return
    for row, state in rows:
        print(f"{row[0]}: {row[2]}")
        for why in state.why:
            print(f"    {why}")


def _lessons_to_list(options: argparse.Namespace, root: Path) -> list[Strategy]:
    """All lessons; on another model those that were run on it."""
    from qlib.runs.state import folder_of

    lessons = find_lessons(root)
    if options.model:
        lessons = [replace(lesson, model=options.model) for lesson in lessons]
        lessons = [lesson for lesson in lessons if folder_of(lesson, options.runs).is_dir()]
    return lessons


def _show(options: argparse.Namespace, root: Path) -> None:
    from qlib.runs.join import joined, speed_records
    from qlib.runs.listing import describe_lesson, describe_record, find_record
    from qlib.runs.state import state_of

    lesson = next((lesson for lesson in find_lessons(root) if lesson.name == options.name), None)
    if lesson and not options.json:
        lesson = replace(lesson, model=options.model or lesson.model)
        print(describe_lesson(lesson, state_of(lesson, root, options.runs)))
        return
    record = find_record(options.name, root, options.runs, options.model)
    record = joined(record, speed_records(options.runs, root / "reports" / "published"))
    print(json.dumps(record, indent=2, ensure_ascii=False) if options.json else describe_record(record))
