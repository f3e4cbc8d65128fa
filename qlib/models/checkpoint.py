"""Read what a safetensors checkpoint holds, and say in one line what is wrong with it, before loading any weight."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlib.errors import UserError

__all__ = [
    "TensorEntry", "check_entries", "check_tokenizer", "lost_shard", "read_config", "read_entries", "read_header", "read_json", "read_tensor",
]  # fmt: skip

PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
PIECE = 2**22  # numbers that are looked at together
TOKENIZERS = ("tokenizer.json", "vocab.json", "tokenizer.model", "qwen.tiktoken")


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: its file, and its shape, dtype and bytes `[begin, end)` behind the header, as that tells them."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    bytes: tuple[int, int] = (0, 0)


def read_config(folder: Path) -> dict:
    """config.json of a model folder.

    Raises:
        UserError: it is missing or is not JSON.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: has no config.json; a model folder holds config.json and *.safetensors")
    return read_json(path)


def read_json(path: Path) -> dict:
    """What a JSON file of a model folder says.

    Raises:
        UserError: it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: is not JSON ({error})") from None


def read_entries(folder: Path) -> dict[str, TensorEntry]:
    """Every tensor of the checkpoint by name, from the headers alone.

    Raises:
        UserError: no safetensors file (pickled weights are refused), a missing or truncated shard, a broken header, an
            index that names a tensor its shard does not hold.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = json.loads(index.read_text(encoding="utf-8")).get("weight_map", {})
        files = sorted({folder / name for name in weight_map.values()})
    else:
        weight_map, files = {}, sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = [file.name for pattern in PICKLES for file in sorted(folder.glob(pattern))]
        if pickled:
            raise UserError(
                f"{folder}: holds pickled weights only ({pickled[0]}), which can run code when loaded; "
                "convert them to safetensors"
            )
        raise UserError(f"{folder}: has no *.safetensors file")
    if lost := next((file for file in files if not file.is_file()), None):
        raise UserError(f"{lost}: {lost_shard(weight_map, lost.name)}")
    entries = {name: entry for file in files for name, entry in read_header(file).items()}
    for name, file in weight_map.items():
        if name not in entries:
            raise UserError(f"{folder / file}: tensor '{name}' is missing although the index names it")
    return entries


def lost_shard(weight_map: dict[str, str], file: str) -> str:
    """What to say of a shard that an index names and that is not there: the tensors it should hold."""
    first, *others = [name for name, where in weight_map.items() if where == file]
    more = f" and {len(others)} more" if others else ""
    return f"is missing although the index names it for tensor '{first}'{more}"


def read_tensor(name: str, entry: TensorEntry) -> Any:
    """A tensor as it is stored, mapped from its file: it takes memory only once it is copied or changed.

    Raises:
        UserError: values that are not finite, naming file and tensor.
    """
    import torch  # here, so that headers can be looked at without it
    from safetensors import safe_open

    with safe_open(entry.file, "pt") as file:
        tensor = file.get_tensor(name)
    extremes = (torch.stack(part.aminmax()) for part in tensor.view(-1).split(PIECE))  # NaN, if there is one; many times faster
    if tensor.is_floating_point() and not all(bool(torch.isfinite(both).all()) for both in extremes):
        raise UserError(f"{entry.file}: tensor '{name}' holds values that are not finite (NaN or infinity)")
    return tensor


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Parse a safetensors header: 8 bytes of length, JSON, then the data that the offsets point into.

    Raises:
        UserError: the file is missing, truncated or no safetensors file.
    """
    if not file.is_file():
        raise UserError(f"{file}: is missing")
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise UserError(f"{file}: is truncated ({size} bytes, its header alone takes {length + 8})")
        try:
            header = json.loads(stream.read(length))
        except ValueError:
            raise UserError(f"{file}: is not a safetensors file (its header is not JSON)") from None
    header.pop("__metadata__", None)
    needed = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size < needed:
        last = max(header, key=lambda name: header[name]["data_offsets"][1])
        raise UserError(f"{file}: is truncated ({size} of {needed} bytes; tensor '{last}' is cut off)")
    return {name: TensorEntry(file, tuple(e["shape"]), e["dtype"], tuple(e["data_offsets"])) for name, e in header.items()}


def check_entries(entries: dict[str, TensorEntry], expected: dict[str, tuple[int, ...]], folder: Path) -> None:
    """Compare a checkpoint with the tensors that its configuration asks for.

    Raises:
        UserError: a missing, surplus or mis-shaped tensor, naming file and tensor.
    """
    for name, shape in expected.items():
        if name not in entries:
            raise UserError(f"{folder}: tensor '{name}' is missing from the safetensors files")
        if entries[name].shape != shape:
            raise UserError(
                f"{entries[name].file}: tensor '{name}' has shape {list(entries[name].shape)}, "
                f"config.json asks for {list(shape)}"
            )


def check_tokenizer(folder: Path) -> None:
    """Make sure that a tokenizer's files are there.

    Raises:
        UserError: none is.
    """
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise UserError(f"{folder}: has no tokenizer ({', '.join(TOKENIZERS)})")
