"""Stream a model: read a block, compress it, write it, go on. What is finished is kept, whatever happens."""

import shutil
from pathlib import Path
from typing import Any

from qlib.blockwise import Step, compress_block, wants_targets
from qlib.compress import WALKED, calibration_ids, later_grid
from qlib.errors import UserError
from qlib.models.checkpoint import read_header
from qlib.models.families import blocks_of, family_of
from qlib.models.load import Subject
from qlib.progress import progress
from qlib.recipe import Context, pass_name, read_recipe
from qlib.refuse import check_recipe
from qlib.runs.state import Busy, hold
from qlib.stream.allocator import return_freed_memory
from qlib.stream.blocks import BlocksOnDisk
from qlib.stream.files import write_json, write_tensors
from qlib.stream.fingerprint import fingerprint
from qlib.stream.formats import block_tensors, check_format, check_scales, end_tensors, entry_of, write_beside
from qlib.stream.hub import open_source
from qlib.stream.manifest import Manifest, signature
from qlib.stream.source import Stored
from qlib.walk import Batch, Visit

__all__ = ["stream"]

WORK = ".stream"
INDEX = "model.safetensors.index.json"


def stream(
    model: str,
    recipe: list[dict[str, Any]],
    output: str | Path,
    calibration: Any = None,
    seed: int = 0,
    mapped: bool = False,
    device: str = "cpu",
    revision: str | None = None,
    format: str = "packed",
) -> Manifest:
    """Compress the checkpoint `model` into the folder `output`, in a format of `qlib.save`, tensor for tensor.

    In memory are one block and what compressing it takes, and what reaches it of the calibration text. A killed call
    goes on after the last finished block when it is repeated, to the same files; only a plan pass begins anew.

    Args:
        model: as `qlib.load` takes it. recipe, calibration, seed: as `qlib.compress` takes them.
        mapped: leave what reaches a block on disk, in the output folder, and map it from there.
        device: "cpu" or "cuda": where a block is put while it is compressed; the next one is read meanwhile.
        revision: branch, tag or commit of a hub model. Its shards are fetched one ahead, and removed when they were read.
        format: as `qlib.save` takes it.

    Raises:
        UserError: a recipe that needs the whole model, or whose result the format cannot hold; a broken checkpoint; a
            folder that cannot be written, or holds what other parameters began.
    """
    return_freed_memory()
    steps = read_recipe(recipe)
    check_streams(steps)
    folder = Path(output)
    work = folder / WORK
    subject, stored, told = open_source(model, revision, folder, work / "shards")
    check_recipe(subject, steps)
    check_format(subject, steps, format, seed)
    ids = calibration_ids(subject, steps, calibration, seed)
    signed = signature(told or fingerprint(subject.source.folder), steps, ids, seed, format, device)
    done = Manifest(folder, work, signed)  # refuses before anything is made
    try:
        if done.complete and not work.exists():
            return done
        if done.plan is None:
            check_scales(subject, stored, steps, format, seed)
        work.mkdir(parents=True, exist_ok=True)
        with hold(work):
            done = Manifest(folder, work, signed)  # as the process that held it before has left it
            if not done.complete:
                subject.model.blocks_on_disk = BlocksOnDisk(subject.model, stored, work, mapped, device)
                _fill(folder, subject, stored, steps, Context(ids, seed), done)
            shutil.rmtree(work)
    except Busy:
        raise UserError(f"{folder}: is being written by another process") from None
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); finished blocks are kept") from None
    finally:
        stored.close()
    return done


def check_streams(steps: list[Step]) -> None:
    """Refuse what one walk through a model on disk cannot do.

    Raises:
        UserError: names the pass and the reason.
    """
    walked = [index for index, (module, _) in enumerate(steps) if module.SCOPE in WALKED]
    for index, (module, options) in enumerate(steps):
        where, what = f"recipe[{index}]: pass '{pass_name(module)}'", "a stream has one block at a time in memory"
        if module.SCOPE == "model":
            raise UserError(f"{where} works on the whole model, but {what}; allowed: passes of linears and blocks")
        if module.SCOPE == "plan" and not getattr(module, "streams", lambda options: False)(options):
            raise UserError(f"{where} plans on the whole model with these options, but {what}")
        if module.SCOPE == "plan" and walked and index > walked[0]:
            raise UserError(f"{where} plans on what passes before it leave; a stream plans first, on the model as it was")
    if not walked:
        raise UserError("recipe: has no pass that changes weights block by block, e.g. rtn")


def _fill(folder: Path, subject: Subject, stored: Stored, steps: list[Step], context: Context, done: Manifest) -> None:
    """Write all parts that are not there yet: the embedding, the blocks, norm and head, and what lies beside weights."""
    family, count, format = family_of(subject.config), len(blocks_of(subject.model)), done.signature["format"]
    place = done.work if format == "gguf" else folder
    files = [place / f"model-{part + 1:05d}-of-{count + 2:05d}.safetensors" for part in range(count + 2)]
    ends = [f"{part}.weight" for part in (family.embedding, family.norm, family.head)]
    parts = [f"{family.blocks}.{index}." for index in range(count)]
    if stored.shards and not done.path.is_file():
        done.write()  # a later call goes on with this commit
    if not done.shards:
        stored.expect([ends[0], parts[0]])
        stored.check_twin(ends[0])
        _copy(ends[:1], subject, stored, files[0], done)
    if format != "gguf":  # whose parts are encoded
        stored.move(ends[0], files[0])
    if done.plan is None:
        stored.expect(parts * sum(module.SCOPE == "plan" for module, _ in steps) + parts[:1])
        plan: dict[str, dict[str, Any]] = {}
        for module, options in steps:
            plan |= module.plan(subject, options, context) if module.SCOPE == "plan" else {}
        done.plan, done.entry = plan, done.entry | entry_of(subject, steps, plan, format)
        done.write()
    stored.expect([*parts[max(0, len(done.shards) - 1) :], *(name for name in ends[1:] if name in stored.names)])
    if len(done.shards) <= count:
        _compress(subject, [step for step in steps if step[0].SCOPE in WALKED], context, files[1:-1], done)
    if len(done.shards) <= count + 1:
        _copy([name for name in ends[1:] if name in stored.names], subject, stored, files[-1], done)
    if format == "gguf":
        from qlib.stream import gguf

        done.only(folder / gguf.FILE, gguf.write_file(subject, done.entry["types"], files, folder, done.work))
    else:
        _write_index(files, done)
        write_beside(subject, folder, done.entry, format, done.work)
    done.complete = True
    done.write()


def _copy(names: list[str], subject: Subject, stored: Stored, file: Path, done: Manifest) -> None:
    """Write tensors as they are into one file, a piece at a time."""
    layout, pieces, entry = end_tensors(names, stored, subject.config, done.signature["format"])
    done.add(file, write_tensors(file, done.work, layout, pieces), entry)


def _compress(subject: Subject, steps: list[Step], context: Context, files: list[Path], done: Manifest) -> None:
    """Walk on from the first block that is not finished; as `qlib.walk`, but a later call finds what is handed on."""
    blocks, first = subject.model.blocks_on_disk, len(done.shards) - 1
    inputs = blocks.first(context.ids) if context.ids else []
    exact = inputs if wants_targets(steps) else []
    if first:
        inputs, exact = blocks.read(f"inputs-{first}", inputs), blocks.read(f"exact-{first}", exact)
    for index in progress(first, len(files), "streaming", every=0):
        inputs, exact = _compress_one(index, subject, steps, context, inputs, exact, files, done)
        blocks.forget(before=index)


def _compress_one(
    index: int, subject: Subject, steps: list[Step], context: Context, inputs: list[Batch], exact: list[Batch],
    files: list[Path], done: Manifest,
) -> tuple[list[Batch], list[Batch]]:  # fmt: skip
    """Read, compress and write one block; returns what reaches the next one, and would in the model as it was."""
    blocks, more = subject.model.blocks_on_disk, index + 1 < len(files)
    with blocks.open(index) as block:
        ahead = blocks.run(block, exact, f"exact-{index + 1}") if exact else []
        path = f"{family_of(subject.config).blocks}.{index}"
        visit = Visit(index, path, block, inputs, [hidden for hidden, _ in ahead] if exact else None, bool(inputs))
        layers = compress_block(visit, steps, later_grid(steps, steps), done.plan, subject.config, context.seed)
        behind = blocks.run(block, inputs, f"inputs-{index + 1}") if inputs and more else []
        tensors, entry = block_tensors(subject, index, done.signature["format"])
        layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        size = write_tensors(files[index], done.work, layout, tensors.values())
    done.add(files[index], size, entry, layers.values())
    return behind, ahead


def _write_index(files: list[Path], done: Manifest) -> None:
    """Which file holds which tensor."""
    where = {name: file.name for file in files for name in read_header(file)}
    total = {"total_size": sum(shard["data"] for shard in done.shards)}
    write_json(files[0].with_name(INDEX), {"metadata": total, "weight_map": dict(sorted(where.items()))}, done.work)
