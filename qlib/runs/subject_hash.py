"""Fingerprints of what a strategy reads from outside the code: the model's files and the text."""

import hashlib
import json
import os
from pathlib import Path

from qlib.errors import UserError
from qlib.models.checkpoint import check_tokenizer, read_entries
from qlib.paths import MODELS, REFERENCE, cache_folder, shipped_model, write_atomic

__all__ = ["model_hash", "data_hash", "hash_files"]

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def model_hash(model: str, root: Path) -> str:
    """SHA-256 over configuration and weights of a shipped model or a folder; id and revision of a hub model.

    Raises:
        UserError: a path that does not exist, a folder without config.json or without safetensors.
    """
    if shipped := shipped_model(model):
        return _folder_hash(MODELS / shipped)
    folder = Path(root, Path(model).expanduser())
    if folder.is_dir():
        return _folder_hash(folder)
    if Path(model).is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise UserError(f"model: '{model}' is neither '{REFERENCE}', nor an existing folder, nor a hub id (owner/name)")
    return f"hub {model} {_hub_revision(model)}"


def _folder_hash(folder: Path) -> str:
    if not (folder / "config.json").is_file():
        raise UserError(f"model: {folder} holds no config.json; allowed: a checkpoint as save_pretrained writes it")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickled = [file.name for pattern in PICKLES for file in sorted(folder.glob(pattern))]
        found = f"only {pickled[0]}, which may run code when loaded" if pickled else "no weights"
        raise UserError(f"model: {folder} holds {found}; allowed: *.safetensors")
    # From headers and names alone, so that a broken folder is refused before a kernel starts.
    read_entries(folder)
    check_tokenizer(folder)
    return hash_files([*sorted(folder.glob("*.json")), *sorted(folder.glob("*.tiktoken")), *weights])


def _hub_revision(model: str) -> str:
    """The commit that the local hub cache holds, "unfetched" before the first download."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    pointer = hub / f"models--{model.replace('/', '--')}" / "refs" / "main"
    return pointer.read_text().strip() if pointer.is_file() else "unfetched"


def data_hash(text: str, root: Path) -> str:
    """SHA-256 of a text source: the reference corpus' manifest, a file, or the files of a folder.

    Raises:
        UserError: no such file or folder.
    """
    if text == "reference":
        from qlib.data.corpus import manifest_hash

        return manifest_hash()
    path = Path(root, Path(text).expanduser())
    if path.is_file():
        return hash_files([path])
    if path.is_dir():
        return hash_files(sorted(file for file in path.rglob("*") if file.is_file()), path)
    raise UserError(f"text: '{text}' is not an existing file or folder; allowed: reference, a file, a folder")


def hash_files(files: list[Path], base: Path | None = None) -> str:
    """SHA-256 over names and contents. The hash of a file is remembered with its size and time of change."""
    memory = _read_memory()
    known, digest = len(memory), hashlib.sha256()
    for file in files:
        state = file.stat()
        mark = f"{file.resolve()}|{state.st_size}|{state.st_mtime_ns}"
        if mark not in memory:
            with file.open("rb") as stream:
                memory[mark] = hashlib.file_digest(stream, "sha256").hexdigest()
        name = file.relative_to(base) if base else file.name
        digest.update(f"{name}\0{memory[mark]}\n".encode())
    if len(memory) > known:
        _write_memory(memory)
    return digest.hexdigest()


def _read_memory() -> dict[str, str]:
    try:
        return json.loads((cache_folder() / "hashes.json").read_text())
    except (OSError, ValueError):
        return {}


def _write_memory(memory: dict[str, str]) -> None:
    try:
        write_atomic(cache_folder() / "hashes.json", json.dumps(memory, indent=0))
    except OSError:
        pass  # only slower next time
