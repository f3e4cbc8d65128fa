"""`qlib stream`: compress a checkpoint that may be far larger than the memory."""

import argparse
from pathlib import Path
from typing import Any

from qlib.arguments import file_or_name, folder_or_id, path
from qlib.errors import UserError, nearest
from qlib.export.command import FORMATS, say_whether_vllm_loads

__all__ = ["add_command"]

SUMMARY = "apply a recipe to a checkpoint block by block, from disk to disk; goes on where it was interrupted"


def add_command(commands: Any, **style: Any) -> None:
    """Add `stream` to the subcommands of `qlib`."""
    parser = commands.add_parser("stream", help=SUMMARY, description=SUMMARY, **style)
    parser.add_argument("file", metavar="FILE", type=file_or_name, help="a strategy file, or its name")
    parser.add_argument("--model", type=folder_or_id, help="a folder or a hub id (default: that of the strategy)")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id (default: main)")
    parser.add_argument("--output", metavar="FOLDER", type=path, required=True, help="a new folder, or one to finish")
    parser.add_argument("-p", dest="changes", action="append", default=[], metavar="KEY=VALUE", help="other parameters")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where blocks are compressed (default: cpu)")
    parser.add_argument("--format", choices=FORMATS, default="packed", help="as of `qlib export` (default: packed, qlib's own)")
    parser.add_argument("--mapped", action="store_true", help="leave activations on disk, in FOLDER")
    parser.add_argument("--runs", metavar="DIR", type=path, help=argparse.SUPPRESS)
    parser.set_defaults(action=_stream)


def _stream(options: argparse.Namespace, root: Path) -> None:
    from qlib.evaluate.memory import track_peak
    from qlib.params import load_strategy, override
    from qlib.runs.provenance import gpu
    from qlib.stream.run import stream
    from qlib.yamltext import parse_assignments

    known = {file.stem: file for file in (root / "params").glob("*.yaml")}
    file = Path(options.file) if Path(options.file).is_file() else known.get(options.file)
    if file is None:
        close = nearest(Path(options.file).stem, known)
        raise UserError(f"{options.file}: no such strategy file{close}; see `qlib list`")
    strategy = override(load_strategy(file, root), parse_assignments(options.changes))
    model = options.model or strategy.model
    if options.device == "cuda" and not gpu():
        raise UserError("device: cuda is asked for, but there is no GPU that this build of torch can use")
    with track_peak() as peak:
        told = {"mapped": options.mapped, "device": options.device, "revision": options.revision, "format": options.format}
        done = stream(model, strategy.recipe, options.output, strategy.calibration, strategy.seed, **told)
    size, most = sum(shard["bytes"] for shard in done.shards) / 1e6, peak.bytes / 1e6
    print(f"{options.output}: {strategy.name} of {model}, {size:,.1f} MB; at most {most:,.0f} MB of memory")
    if options.format in ("gptq", "compressed_tensors"):
        say_whether_vllm_loads(options.output)
