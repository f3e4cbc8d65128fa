"""Read texts by the name the params give them: the reference corpus, a file or a folder."""

import hashlib
from pathlib import Path
from typing import Sequence

from qlib.data.corpus import Document, manifest_hash, read_split
from qlib.errors import UserError

__all__ = ["read_documents", "hash_documents", "SUFFIXES"]

SUFFIXES = (".txt", ".md", ".py", ".json", ".jsonl", ".csv", ".rst", ".html", ".tex")
PARAGRAPHS = 40  # lines of a long single file that make one document


def read_documents(text: str, split: str) -> list[Document]:
    """The documents of one split of a text source.

    Args:
        text: "reference", a UTF-8 file or a folder of them. Files of the user are split by content, so that
            calibration, development and evaluation never share a document. Training reads the calibration text.

    Raises:
        UserError: nothing there, not UTF-8, or too little text to split.
    """
    if text == "reference":
        return read_split(split)
    path = Path(text)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
        documents = [Document(str(file.relative_to(path)), _read(file)) for file in files]
    elif path.is_file():
        lines = _read(path).splitlines(keepends=True)
        chunks = ["".join(lines[at : at + PARAGRAPHS]) for at in range(0, len(lines), PARAGRAPHS)]
        documents = [Document(f"{path.name}#{index}", chunk) for index, chunk in enumerate(chunks)]
    else:
        raise UserError(f"text: '{text}' is neither 'reference' nor an existing file or folder")
    wanted = "calibration" if split == "train" else split  # what a method may look at, whatever it does with it
    chosen = [document for document in documents if document.text.strip() and _split_of(document) == wanted]
    if not chosen:
        raise UserError(f"text: '{text}' holds too little text for a '{split}' split ({len(documents)} documents)")
    return chosen


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is not UTF-8 text (byte {error.start})") from None


def _split_of(document: Document) -> str:
    """Half evaluation, a quarter calibration, a quarter development, by content."""
    draw = hashlib.sha256(document.text.encode("utf-8")).digest()[0] % 4
    return ("evaluation", "evaluation", "calibration", "development")[draw]


def hash_documents(text: str, documents: Sequence[Document]) -> str:
    """SHA-256 that fixes the data: of the manifest for the reference corpus, else of the texts."""
    if text == "reference":
        return manifest_hash()
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.text.encode("utf-8") + b"\0")
    return digest.hexdigest()
