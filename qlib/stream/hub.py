"""Open what a stream reads: a folder, the hub's cache, or a repository of the hub of which only headers are fetched now."""

import hashlib
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qlib.errors import UserError
from qlib.models.checkpoint import PICKLES, TOKENIZERS, lost_shard, read_json
from qlib.models.families import family_of
from qlib.models.load import HUB_FILES, HUB_ID, Source, Subject, locate
from qlib.paths import shipped_model
from qlib.stream.hub_client import Repository, explained, look_up, sha256_of
from qlib.stream.manifest import NAME
from qlib.stream.shards import Shards
from qlib.stream.source import Stored, open_model

__all__ = ["open_source"]

INDEX = "model.safetensors.index.json"
DEFAULT = "main"
SMALL = tuple(HUB_FILES)


def open_source(
    model: str, revision: str | None, output: Path, shards: Path
) -> tuple[Subject, Stored, dict[str, Any] | None]:
    """A model without weights, where its tensors are, and of a hub model what tells it from every other.

    Args:
        revision: branch, tag or commit of a hub model. A stream that was begun in `output` goes on with its commit.
        shards: a folder for the shards of a hub model that is not in the hub's cache as a whole.

    Raises:
        UserError: as `open_model`; a revision of a folder, or another one than was begun with; trouble with the hub.
    """
    if shipped_model(model) or Path(model).is_dir() or not HUB_ID.fullmatch(model):
        source = locate(model)
        if revision:
            raise UserError(f"revision: '{revision}' is not allowed, {source.folder} is a folder; allowed: with owner/name")
        return *_open_here(source), None
    asked, commit = _pinned(model, revision or DEFAULT, output)
    if folder := _cached(model, commit or asked):
        print(f"{model}: commit {folder.name[:12]}, from the hub's cache", file=sys.stderr)
        subject, stored = _open_here(Source(model, folder, folder.name))
        files = {os.path.relpath(file, folder): file for file in {entry.file for entry in stored.entries.values()}}
        return subject, stored, _told(model, asked, folder.name, {name: _link_hash(file) for name, file in files.items()})
    repository = look_up(model, commit or asked)
    subject, stored = _open_remote(repository, shards)
    names = {str(entry.file.relative_to(shards)) for entry in stored.entries.values()}
    size = sum(repository.files[name].size for name in names)
    print(
        f"{model}: commit {repository.commit[:12]}, {len(names)} shards, {size / 1e6:,.1f} MB; "
        "fetched one ahead, for every pass that reads them, and removed when read", file=sys.stderr,
    )  # fmt: skip
    return subject, stored, _told(model, asked, repository.commit, {name: repository.files[name].hash for name in names})


def _open_here(source: Source) -> tuple[Subject, Stored]:
    subject, stored = open_model(source)
    stored.check_twin(f"{family_of(subject.config).embedding}.weight")  # of what must be fetched first, later
    return subject, stored


def _told(model: str, asked: str, commit: str, hashes: dict[str, str]) -> dict[str, Any]:
    lines = "".join(f"{name}\0{hashes[name]}\n" for name in sorted(hashes))
    return {"hub": model, "revision": asked, "commit": commit, "weights": hashlib.sha256(lines.encode()).hexdigest()}


def _pinned(model: str, asked: str, output: Path) -> tuple[str, str | None]:
    """The revision, and the commit that it stood for when the stream in `output` was begun, None if none was."""
    try:
        begun = json.loads((output / NAME).read_text(encoding="utf-8"))["signature"]["model"]
        if begun["hub"] != model:
            return asked, None  # the manifest will be refused, and say so
        before, commit = begun["revision"], begun["commit"]
    except (OSError, ValueError, KeyError, TypeError):
        return asked, None
    if asked not in (before, commit):
        raise UserError(
            f"revision: '{asked}' is not what {output / NAME} was begun with; allowed: '{before}' (commit {commit[:12]}), "
            "or another folder"
        )
    return before, commit


def _cached(model: str, revision: str) -> Path | None:
    """The folder of a model in the hub's cache, if all of it is there."""
    from huggingface_hub import try_to_load_from_cache

    with explained(model):
        config = try_to_load_from_cache(model, "config.json", revision=revision)
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    index = folder / INDEX
    names = set(read_json(index).get("weight_map", {}).values()) if index.is_file() else {"model.safetensors"}
    whole = names and all((folder / name).is_file() for name in names)
    return folder if whole and any((folder / name).is_file() for name in TOKENIZERS) else None


def _link_hash(file: Path) -> str:
    """The hub's hash of a file in its cache: the name of what it links to, or computed where there are no links."""
    target = file.resolve().name if file.is_symlink() else ""
    return target if len(target) in (40, 64) else sha256_of(file)


def _open_remote(repository: Repository, shards: Path) -> tuple[Subject, Stored]:
    """Check the model from its small files and its headers, in a folder that looks like the checkpoint but has no data."""
    beside = TemporaryDirectory(prefix="qlib-")  # the tokenizer may look there again
    folder = Path(beside.name)
    top = [name for name in repository.files if "/" not in name]
    weights = [name for name in top if name.endswith(".safetensors")]
    for name in top:
        if name not in weights and any(fnmatch(name, pattern) for pattern in SMALL):
            repository.fetch(name, folder)
        elif any(fnmatch(name, pattern) for pattern in PICKLES):
            (folder / name).touch()  # to be refused by name if there is nothing else
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map", {})
        weights = sorted(set(weight_map.values()))
        for name in weights:
            if name not in repository.files:
                raise UserError(f"{repository.model}/{name}: {lost_shard(weight_map, name)}")
    with ThreadPoolExecutor(8) as pool:
        headers = dict(zip(weights, pool.map(repository.header, weights)))
    try:
        for name, header in headers.items():
            _write_hollow(folder / name, header, repository.files[name].size)
        subject, stored = open_model(Source(repository.model, folder, repository.commit))
    except UserError as error:
        raise UserError(str(error).replace(str(folder), repository.model)) from None
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from None
    for name in weights:
        (folder / name).unlink()  # so that nobody takes its zeros for weights
    stored.entries = {
        name: replace(entry, file=shards / entry.file.relative_to(folder)) for name, entry in stored.entries.items()
    }
    stored.shards, stored.beside = Shards(repository, shards), beside
    return subject, stored


def _write_hollow(file: Path, header: dict[str, Any], size: int) -> None:
    """A safetensors file of this header and size, whose data is a hole."""
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, size)
