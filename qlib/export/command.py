"""`qlib export`: write the model of a strategy as other programs load it."""

import argparse
from pathlib import Path
from typing import Any

from qlib.arguments import add_runs, path
from qlib.errors import UserError, nearest
from qlib.paths import slug

__all__ = ["add_command", "say_whether_vllm_loads", "FORMATS"]

SUMMARY = "write the model of a strategy, or of a folder, in a format that other programs load"
FORMATS = ("gptq", "compressed_tensors", "gguf", "dense", "packed")


def add_command(commands: Any, **style: Any) -> None:
    """Add `export` to the subcommands of `qlib`."""
    parser = commands.add_parser("export", help=SUMMARY, description=SUMMARY, **style)
    parser.add_argument("name", metavar="NAME", type=_source, help="a strategy that has run, or a folder with a model")
    parser.add_argument("--format", choices=FORMATS, required=True, help="dense is bf16, packed is qlib's own")
    parser.add_argument("--output", metavar="FOLDER", type=path, required=True, help="a folder that is not there yet")
    parser.add_argument("--model", help="which model the strategy ran on, if on several")
    add_runs(parser)
    parser.set_defaults(action=_export)


def _source(text: str) -> str | Path:
    """A folder with a checkpoint; otherwise it is the name of a strategy, and stays."""
    return path(text) if (path(text) / "config.json").is_file() else text


def _export(options: argparse.Namespace, root: Path) -> None:
    from qlib.models.load import load
    from qlib.models.save import save
    from qlib.prune.mask import is_pruned

    folder = options.output
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"output: {folder} is there already; name a folder that is not")
    source = options.name if isinstance(options.name, Path) else _model_of(options.name, options.runs, options.model)
    subject = load(str(source))
    size = save(subject, folder, options.format)["size.disk_bytes"].value
    print(f"{folder}: {options.format} of {source}, {size / 1e6:,.1f} MB")
    if options.format != "packed" and any(map(is_pruned, subject.model.modules())):
        print("its zeros are stored like other weights: no program but qlib reads a file without them")
    if options.format in ("gptq", "compressed_tensors"):
        say_whether_vllm_loads(folder)


def say_whether_vllm_loads(folder: Path) -> None:
    """Print it, with all that is against it."""
    from qlib.export.vllm_check import VERSION, problems

    found = problems(folder)
    print(f"vLLM {VERSION}: {'loads it' if not found else 'would refuse it:'}")
    for line in found:
        print(f"    {line}")


def _model_of(name: str, runs: Path, model: str | None) -> Path:
    """The model that the run of a strategy left.

    Raises:
        UserError: it has not run, left none, or ran on several models.
    """
    folders = sorted(runs.glob(f"{slug(model) if model else '*'}/*/*/"))
    found = [folder / "model" for folder in folders if folder.name == name]
    there = [folder for folder in found if (folder / "config.json").is_file()]
    if not found:
        known = {one.name for one in folders}
        raise UserError(f"{name}: has not run here{nearest(name, known)}; `qlib run {name}` does it")
    if not there:
        raise UserError(f"{name}: its run kept no model; what other tools compute is not kept")
    if len({folder.parents[2] for folder in there}) > 1:
        models = ", ".join(sorted(folder.parents[2].name for folder in there))
        raise UserError(f"{name}: ran on several models ({models}); choose one with --model")
    return there[0]
