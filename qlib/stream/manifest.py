"""What a stream has done so far, and with what: it goes on only if nothing that decides its result has changed."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

import qlib
from qlib.blockwise import Step
from qlib.errors import UserError
from qlib.recipe import pass_name
from qlib.stream.files import write_json

__all__ = ["NAME", "Manifest", "signature"]

NAME = "stream.json"
VERSION = 2  # of this file
PARTS = ("shards", "plan", "layers", "entry", "complete")


def signature(
    model: str | dict[str, Any], steps: list[Step], ids: list[torch.Tensor], seed: int, format: str, device: str = "cpu"
) -> dict[str, Any]:
    """Everything that decides what is written.

    Args:
        model: what `fingerprint` says of its files; of a hub model its name, revision, commit, and a hash over those of its
            weights.
        ids: token ids `[rows, tokens]` of each batch of calibration text.
        format: of what is written.
        device: what is computed on a GPU, or by another number of threads, differs in its last bits.
    """
    digest = hashlib.sha256()
    for batch in ids:
        digest.update(f"{list(batch.shape)}".encode() + batch.to(torch.int64).contiguous().numpy().tobytes())
    return {
        "manifest": VERSION,
        "format": format,
        "model": model,
        "recipe": [{"pass": pass_name(module)} | asdict(options) for module, options in steps],
        "calibration": digest.hexdigest() if ids else None,
        "seed": seed,
        "device": device,
        "threads": torch.get_num_threads() if ids and device == "cpu" else None,
        "versions": {"qlib": qlib.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }


class Manifest:
    """The file that says how far a stream is. Written whole, after each part; holds no time, so that it repeats, too.

    Attributes:
        shards: file and bytes of each finished part. layers: figures of each linear.
        entry: ``quantization_config`` of config.json, in the packed format that of the finished blocks; types of a GGUF file.
        plan: what plan passes chose, None before they have. complete: whether the folder is a checkpoint.

    Raises:
        UserError: the folder holds something else, or what a stream with other parameters began.
    """

    def __init__(self, folder: Path, work: Path, signed: dict[str, Any]) -> None:
        self.path, self.work = folder / NAME, work
        self.signature = json.loads(json.dumps(signed))
        self.shards: list[dict[str, Any]] = []
        self.layers: list[dict[str, Any]] = []
        self.entry: dict[str, Any] = {}
        self.plan: dict[str, Any] | None = None
        self.complete = False
        if self.path.is_file():
            self._go_on(folder)
        elif folder.is_dir() and any(one != work for one in folder.iterdir()):
            raise UserError(f"output: {folder} is there already and holds no {NAME}; name a folder that is new or empty")

    def _go_on(self, folder: Path) -> None:
        try:
            told = json.loads(self.path.read_text(encoding="utf-8"))
            before, *parts = (told[name] for name in ("signature", *PARTS))
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{self.path}: is no manifest of a stream; name another folder") from None
        if changed := _differences(before, self.signature):
            raise UserError(f"{self.path}: was begun with other parameters: {'; '.join(changed)}; name another folder")
        for name, value in zip(PARTS, parts):
            setattr(self, name, value)
        for shard in self.shards:
            file = folder / shard["file"]
            size = file.stat().st_size if file.is_file() else None
            if size != shard["bytes"]:
                found = "is missing" if size is None else f"has {size} bytes"
                raise UserError(f"{file}: {found}, {NAME} says {shard['bytes']}; remove {folder} and begin again")

    def add(self, file: Path, size: tuple[int, int], entry: dict[str, Any] | None = None, layers: Any = ()) -> None:
        """Say that a part is finished.

        Args:
            size: bytes of the file, and of the tensors in it.
            entry: what its block adds to ``quantization_config``. layers: figures of its linears.
        """
        self.shards.append({"file": str(file.relative_to(self.path.parent)), "bytes": size[0], "data": size[1]})
        self.layers += layers
        for name, value in (entry or {}).items():
            self.entry[name] = self.entry.get(name, {}) | value if isinstance(value, dict) else value
        self.write()

    def only(self, file: Path, size: int) -> None:
        """Say that one file of `size` bytes has taken the place of all parts; to be written together with `complete`."""
        self.shards, self.entry = [{"file": file.name, "bytes": size, "data": size}], {}

    def write(self) -> None:
        """Write the file."""
        write_json(self.path, {name: getattr(self, name) for name in ("signature", *PARTS)}, self.work)


def _differences(old: Any, new: Any, name: str = "") -> list[str]:
    """Each field that changed, its old and its new value."""
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = [(f"{name}.{key}" if name else key, key) for key in [*old, *(key for key in new if key not in old)]]
        return [line for path, key in pairs for line in _differences(old.get(key), new.get(key), path)]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [line for at, pair in enumerate(zip(old, new)) for line in _differences(*pair, f"{name}.{at}")]
    return [] if old == new else [f"{name}: {_short(old)} -> {_short(new)}"]


def _short(value: Any) -> str:
    """A value, or the begin of a hash."""
    text = json.dumps(value)
    return f"{text[1:11]}..." if isinstance(value, str) and len(value) == 64 else text
