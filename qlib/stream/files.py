"""Write safetensors files piece by piece, so that never all of one is in memory; each is there whole or not at all."""

import json
import os
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Iterable, Iterator, Mapping

import torch

from qlib.errors import UserError

__all__ = ["whole_file", "write_json", "write_tensors", "in_order", "Layout"]

#: Type and shape of each tensor of a file, by name, in the order of their bytes.
Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
#: What safetensors calls the types that qlib stores.
TYPES = {
    torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e8m0fnu: "F8_E8M0", torch.uint8: "U8", torch.int8: "I8", torch.int32: "I32", torch.int64: "I64",
}  # fmt: skip


@contextmanager
def whole_file(path: Path, work: Path) -> Iterator[IO[bytes]]:
    """A file that appears as `path` once it is written to its end; until then it lies in the folder `work`.

    Raises:
        UserError: it cannot be written (full disk, read-only folder); nothing else was touched.
    """
    temporary = work / f"{path.name}.tmp"
    try:
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); finished blocks are kept") from None


def write_json(path: Path, content: Any, work: Path, indent: int = 1) -> None:
    """Write JSON as a whole file."""
    with whole_file(path, work) as file:
        file.write((json.dumps(content, indent=indent) + "\n").encode())


def write_tensors(path: Path, work: Path, layout: Layout, pieces: Iterable[torch.Tensor]) -> tuple[int, int]:
    """Write a safetensors file; returns its size in bytes, and how many of them are the tensors'.

    Args:
        pieces: tensors whose elements, one piece after the other, are those of the tensors of `layout`. They may be made
            while they are asked for.
    """
    header, size = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape) in layout.items():
        begin, size = size, size + dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": TYPES[dtype], "shape": list(shape), "data_offsets": [begin, size]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with whole_file(path, work) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for piece in pieces:
            file.write(memoryview(piece.contiguous().reshape(-1).view(torch.uint8).cpu().numpy()))
    return 8 + len(text) + size, size


def in_order(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By the size of their elements, the largest first, then by name: so none begins between its multiples."""
    return {name: tensors[name] for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))}
