"""The command `qlib`: run strategies, render the report, look at results."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import NoReturn, Sequence

from qlib.bench.command import add_command as add_bench
from qlib.errors import UserError
from qlib.export.command import add_command as add_export
from qlib.params import schema
from qlib.paths import find_root, write_atomic
from qlib.predict.command import add_command as add_predict
from qlib.report.command import add_commands as add_report
from qlib.runs.command import add_command as add_run
from qlib.runs.look import add_commands as add_look
from qlib.stream.command import add_command as add_stream
from qlib.tools.command import add_command as add_tools

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
SCHEMA = "write params/schema.json, from which editors complete strategy files"


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see `{self.prog} --help`)\n")


def _parser() -> argparse.ArgumentParser:
    style = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = _Parser(prog="qlib", description=__doc__, epilog=EXAMPLES, **style)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    style |= {"epilog": EXAMPLES}
    add_run(commands, **style)
    add_report(commands, **style)
    add_look(commands, **style)
    add_stream(commands, **style)
    add_predict(commands, **style)
    add_export(commands, **style)
    add_tools(commands, **style)
    add_bench(commands, **style)
    written = commands.add_parser("schema", help=SCHEMA, description=SCHEMA, **style)
    written.set_defaults(action=_schema, runs=None)
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


def _schema(options: argparse.Namespace, root: Path) -> None:
    print(write_atomic(root / "params" / "schema.json", json.dumps(schema(), indent=2, ensure_ascii=False) + "\n"))


if __name__ == "__main__":
    sys.exit(main())
