"""`qlib tools`: install, list and remove the environments of outside tools."""

import argparse
import shlex
import time
from pathlib import Path
from typing import Any

from qlib.errors import UserError
from qlib.progress import clock
from qlib.tools.environments import Environment, environment_of, names

__all__ = ["add_command"]

ACTIONS = {
    "install": "make the environments of tools from their locks in params/tools/",
    "list": "say which tools are installed, in which version, how much disk they take, and what was measured",
    "remove": "delete the environments of tools",
}


def add_command(commands: Any, **style: Any) -> None:
    """Add `tools` to the subcommands of `qlib`."""
    about = "outside tools that qlib is compared with, each in an environment of its own"
    tools = commands.add_parser("tools", help=about, description=about, **style)
    tools.set_defaults(runs=None)
    actions = tools.add_subparsers(dest="action_name", required=True, metavar="ACTION")
    for name, summary in ACTIONS.items():
        action = actions.add_parser(name, help=summary, description=summary, **style)
        action.set_defaults(action=globals()[f"_{name}"])
        if name != "list":
            action.add_argument("tools", nargs="*", metavar="NAME", help="auto-gptq, gptqmodel, ...")
            action.add_argument("--all", action="store_true", help="all of them")
        if name == "install":
            given = {"default": "", "metavar": "ARGUMENTS"}
            action.add_argument("--pip-args", help="passed to pip, e.g. --pip-args='--find-links wheels'", **given)


def _chosen(options: argparse.Namespace, root: Path) -> list[Environment]:
    if bool(options.tools) == options.all:
        raise UserError(f"tools: name some or say --all; allowed: {', '.join(names(root))}")
    return [environment_of(name, root) for name in (names(root) if options.all else dict.fromkeys(options.tools))]


def _install(options: argparse.Namespace, root: Path) -> int:
    """Install one after the other; a failure stops no other."""
    failed = 0
    for environment in _chosen(options, root):
        begun, name = time.monotonic(), environment.name
        if environment.state != "installed":
            print(f"{name}: installing {environment.version} (log: {environment.log})", flush=True)
        try:
            done = environment.install(shlex.split(options.pip_args))
        except UserError as error:
            print(error, flush=True)
            failed += 1
            continue
        took = f"installed in {clock(time.monotonic() - begun)}" if done else "is installed already"
        print(f"{name}: {environment.version} {took}, {_size(environment.disk_bytes())} on disk", flush=True)
    return 1 if failed else 0


def _list(options: argparse.Namespace, root: Path) -> None:
    rows = [("tool", "version", "state", "measured here", "disk", "Python", "kernel")]
    measured = _measured(root)
    for name in names(root):
        one = environment_of(name, root)
        there = one.state != "not installed"
        kernel = one.kernel.name if (one.kernel / "kernel.json").is_file() else ""
        size = _size(one.disk_bytes()) if there else ""
        rows.append((name, one.version, one.state, measured.get(name, ""), size, one.python_version() if there else "", kernel))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def _measured(root: Path) -> dict[str, str]:
    """Tool -> how many of its strategies have figures that are up to date, of how many; failures named as such."""
    from qlib.params import load_strategies, tool_of
    from qlib.runs.state import state_of

    found: dict[str, list[str]] = {}
    for strategy in load_strategies(sorted((root / "params").glob("tool-*.yaml")), root):
        state = state_of(strategy, root, root / "reports" / "runs").state
        found.setdefault(tool_of(strategy) or "", []).append(state)
    words = {}
    for tool, states in found.items():
        failed = states.count("failed")
        words[tool] = f"{states.count('done')} of {len(states)}" + (f", {failed} failed" if failed else "")
    return words


def _remove(options: argparse.Namespace, root: Path) -> None:
    for environment in _chosen(options, root):
        freed = _size(environment.disk_bytes())
        print(f"{environment.name}: {f'removed, {freed} freed' if environment.remove() else 'is not installed'}")


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
