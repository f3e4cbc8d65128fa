"""Recognize a checkpoint folder without reading all of it: hashing 145 GB would take as long as packing them."""

import hashlib
from pathlib import Path

__all__ = ["fingerprint"]

PAGE, STRIDE = 2**12, 2**22  # of every four MiB of weights one page is read


def fingerprint(folder: Path) -> str:
    """SHA-256 over names, sizes, headers and evenly spaced pages of the weights, and all of what lies beside them.

    It tells apart whatever trained, merged or compressed weights; a change of a few numbers between the pages it does
    not see.
    """
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.json"), *folder.glob("*.tiktoken")]):
        digest.update(f"{file.name}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\n".encode())
        with file.open("rb") as stream:
            header = int.from_bytes(stream.read(8), "little")
            digest.update(stream.read(min(header, size)))
            for begin in range(8 + header, size, STRIDE):
                stream.seek(begin)
                digest.update(stream.read(PAGE))
            stream.seek(max(0, size - PAGE))
            digest.update(stream.read(PAGE))
    return digest.hexdigest()
