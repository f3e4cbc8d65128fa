"""The command `qlib`: run strategies, render the report, look at results."""

import argparse
import hashlib
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, Sequence

from qlib.bench.command import add_command as add_bench
from qlib.errors import UserError, nearest
from qlib.export.command import add_command as add_export
from qlib.params import TIERS, Strategy, check_notebook, load_strategies, override, schema
from qlib.paths import find_root, write_atomic
from qlib.predict.command import add_command as add_predict
from qlib.runs.lessons import find_lessons, taught
from qlib.runs.provenance import torch_device
from qlib.stream.command import add_command as add_stream
from qlib.tools.command import add_command
from qlib.yamltext import parse_assignments

__all__ = ["main"]

EXAMPLES = """examples:
  qlib run                                      what `make report` runs, as far as it is out of date
  qlib run params/rtn-int4.yaml                 one strategy (or just: qlib run rtn-int4)
  qlib run rtn-int4 -p recipe.0.bits=3          the same with other parameters, kept apart from the published one
  qlib run rtn-int4 -p 'recipe=[{pass: rtn, bits: 3}]' -p seed=1
  qlib run notebooks/lessons/pruning.ipynb      one lesson (or just: qlib run lesson-pruning)
  qlib run --model ./my-model                   every core strategy on your model (a folder or a hub id)
  qlib list --why                               what is out of date, and since which change
  qlib show rtn-int4 --json                     all figures of one strategy
  qlib report --output my.html                  render what there is
  qlib export gptq-int4 --format compressed_tensors --output my-folder
                                                its model as transformers and vLLM load it (gguf: llama.cpp)
  qlib stream gptq-int4 --model ./qwen-72b --output ./qwen-72b-int4
                                                a model larger than the memory, block by block, from disk to disk
  qlib predict --model qwen-72b --recipe gptq-int4
                                                sizes, memory and times before anything is run
  qlib tools install gptqmodel auto-round       outside tools to compare with, each in its own environment

exit codes: 0 ok, 1 a strategy failed, 2 bad input, 130 interrupted (the same command goes on from there)"""
#: A run of nobody's interest any more should not hold the machine for days.
LIMIT = 4 * 3600.0


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see `{self.prog} --help`)\n")


def _parser() -> argparse.ArgumentParser:
    style = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = _Parser(prog="qlib", description=__doc__, epilog=EXAMPLES, **style)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def command(name: str, summary: str, action: Any) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=summary, description=summary, epilog=EXAMPLES, **style)
        sub.add_argument("--runs", metavar="DIR", type=_path, help="folder of the runs (default: reports/runs)")
        sub.set_defaults(action=action)
        return sub

    run = command("run", "run strategies and lessons that are out of date", _run)
    run.add_argument(
        "files", nargs="*", metavar="FILE", type=_file,
        help="files or names (default: all of the tier, with the lessons on its families)",
    )  # fmt: skip
    run.add_argument("-p", dest="changes", action="append", default=[], metavar="KEY=VALUE", help="other parameters")
    run.add_argument("--model", type=_folder, help="another model: a folder or a hub id; apart from others, no lessons")
    run.add_argument("--tier", choices=TIERS, help="smoke, core (default), full, which includes core, or gpu")
    run.add_argument("--force", action="store_true", help="run also what is up to date")
    run.add_argument("--limit", type=_seconds, default=LIMIT, metavar="SECONDS", help="per strategy (default: 4 hours)")
    run.add_argument("--device", choices=("cpu", "cuda"), help="where to compute (default: cpu)")

    report = command("report", "render the report from the records there are", _report)
    report.add_argument("--output", metavar="FILE", type=_path, help="default: reports/index.html")

    listed = command("list", "list strategies and lessons, their state and last figures", _list)
    listed.add_argument("--tier", choices=TIERS, help="only these (default: core and full)")
    listed.add_argument("--model", type=_folder, help="runs of another model")
    listed.add_argument("--why", action="store_true", help="say which change made it out of date, and what failed")

    show = command("show", "show the record of one strategy, or the state of a lesson", _show)
    show.add_argument("name", metavar="NAME")
    show.add_argument("--model", type=_folder, help="its record on another model")
    show.add_argument("--json", action="store_true", help="the whole record, with the figures of its shape")

    add_stream(commands, epilog=EXAMPLES, **style)
    add_predict(commands, epilog=EXAMPLES, **style)
    add_export(commands, epilog=EXAMPLES, **style)
    command("publish", "copy finished records and the report to reports/published/", _publish)
    add_command(commands, epilog=EXAMPLES, **style)
    add_bench(commands, epilog=EXAMPLES, **style)
    command("schema", "write params/schema.json, from which editors complete strategy files", _schema)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    options = _parser().parse_args(arguments)
    try:
        root = find_root()
        os.chdir(root)  # what relative paths in strategy files refer to; those typed are absolute by now
        options.runs = options.runs or root / "reports" / "runs"
        os.environ.setdefault("QLIB_CACHE", str(options.runs / "cache"))
        return options.action(options, root) or 0
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `qlib list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _path(text: str) -> Path:
    return Path(text).expanduser().resolve()


def _file(text: str) -> str:
    """The absolute path of a file; otherwise it is the name of a strategy, and stays."""
    return str(_path(text)) if _path(text).is_file() else text


def _folder(text: str) -> str:
    """The absolute path of a folder; otherwise it is a hub id or the name of the shipped model, and stays."""
    return str(_path(text)) if _path(text).is_dir() else text


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
    files = _files(named, root) if named or not options.files else []
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


def _files(given: list[str], root: Path) -> list[Path]:
    """Strategy files: those given by path or name, else all."""
    if not given:
        files = sorted((root / "params").glob("*.yaml"))
        if not files:
            raise UserError(f"{root / 'params'}: holds no strategy files (*.yaml)")
        return files
    known = {file.stem: file for file in (root / "params").glob("*.yaml")}
    for name in given:
        if name not in known and not Path(name).is_absolute():
            raise UserError(f"{name}: no such strategy file{nearest(Path(name).stem, known)}; see `qlib list`")
    return [known.get(name) or Path(name) for name in given]


def _chosen(strategy: Strategy, options: argparse.Namespace) -> bool:
    if options.model and strategy.family == "speed" and not options.files:
        return False  # its model is the name of a shape
    if options.files and not options.tier:
        return True
    tier = options.tier or "core"
    return strategy.tier == tier or (tier == "full" and strategy.tier == "core")


def _renamed(strategy: Strategy, changes: dict[str, Any]) -> Strategy:
    """A name of its own, so that the run does not take the place of the published strategy."""
    digest = hashlib.sha256(json.dumps(changes, sort_keys=True).encode()).hexdigest()[:8]
    return replace(strategy, name=f"{strategy.name}+{digest}")


def _report(options: argparse.Namespace, root: Path) -> None:
    from qlib.report.article import article_text
    from qlib.report.book import collect
    from qlib.report.render import render
    from qlib.runs.runner import check_writable

    target = options.output or root / "reports" / "index.html"
    published = root / "reports" / "published"
    check_writable(target.parent)
    written = render(root, options.runs, published, target)
    book = collect(options.runs, published)
    if any(entry.tier != "smoke" for entry in book.strategies):  # the figures of quick checks mean nothing
        print(article_text(book), end="\n\n")
    print(written)


def _list(options: argparse.Namespace, root: Path) -> None:
    from qlib.runs.listing import list_rows, overridden, table

    strategies = load_strategies(_files([], root), root)
    # Smoke strategies run in a folder of their own and say nothing about a model; those of tier gpu need one.
    apart = ("smoke", "gpu") if torch_device() == "cpu" else ("smoke",)
    strategies = [s for s in strategies if (s.tier == options.tier if options.tier else s.tier not in apart)]
    if options.model:
        strategies = [replace(s, model=options.model) for s in strategies if s.family != "speed"]
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


def _publish(options: argparse.Namespace, root: Path) -> None:
    from qlib.runs.publish import publish

    strategies = load_strategies(_files([], root), root) + find_lessons(root)
    fresh = publish(strategies, options.runs, root / "reports" / "index.html", root / "reports" / "published")
    print(f"{root / 'reports' / 'published'}: {len(fresh)} records from this machine")


def _schema(options: argparse.Namespace, root: Path) -> None:
    print(write_atomic(root / "params" / "schema.json", json.dumps(schema(), indent=2, ensure_ascii=False) + "\n"))


if __name__ == "__main__":
    sys.exit(main())
