"""`qlib report` and `qlib publish`: render the report, and keep it with its records in reports/published/."""

import argparse
from pathlib import Path
from typing import Any

from qlib.arguments import add_runs, path, strategy_files
from qlib.params import load_strategies
from qlib.runs.lessons import find_lessons

__all__ = ["add_commands"]

REPORT = "render the report from the records there are"
PUBLISH = "copy finished records and the report to reports/published/"


def add_commands(commands: Any, **style: Any) -> None:
    """Add `report` and `publish` to the subcommands of `qlib`."""
    report = commands.add_parser("report", help=REPORT, description=REPORT, **style)
    add_runs(report)
    report.add_argument("--output", metavar="FILE", type=path, help="default: reports/index.html")
    report.set_defaults(action=_report)

    publish = commands.add_parser("publish", help=PUBLISH, description=PUBLISH, **style)
    add_runs(publish)
    publish.set_defaults(action=_publish)


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


def _publish(options: argparse.Namespace, root: Path) -> None:
    from qlib.runs.publish import publish

    strategies = load_strategies(strategy_files([], root), root) + find_lessons(root)
    fresh = publish(strategies, options.runs, root / "reports" / "index.html", root / "reports" / "published")
    print(f"{root / 'reports' / 'published'}: {len(fresh)} records from this machine")
