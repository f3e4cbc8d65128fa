"""The reference corpus: Python source of lock-pinned packages, listed file by file in a committed manifest."""

import hashlib
import os
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Sequence

from qlib.errors import UserError

__all__ = [
    "Document", "SPLITS", "MANIFEST", "TRAIN_ONLY", "read_split", "split_entries", "read_entry", "manifest_hash",
    "build_manifest",
]  # fmt: skip

#: A row of a manifest: split, package, SHA-256, path.
Entry = tuple[str, str, str, str]

MANIFEST = Path(__file__).with_name("reference-1.tsv")
SPLITS = ("train", "calibration", "development", "evaluation")
#: What trains the model. Wheels of these are built once per release, so a version pins the text.
PACKAGES = (
    "numpy scipy pandas scikit-learn matplotlib sympy networkx transformers torch seaborn nltk fonttools mpmath "
    "huggingface_hub peft accelerate datasets pydantic papermill nbconvert lm_eval joblib ipython tornado"
).split()
#: CPU and CUDA builds of torch differ in a few files; nothing that `make report` reads may depend on the build.
TRAIN_ONLY = ("torch",)
GENERATED = ("version.py", "_version.py", "__config__.py", "_distributor_init.py")
SMALLEST, LARGEST = 1_000, 200_000  # bytes; shorter files are stubs, longer ones tables


@dataclass(frozen=True)
class Document:
    """One source file: its package-relative path and its text."""

    path: str
    text: str


@lru_cache(maxsize=None)
def _distribution(package: str) -> metadata.Distribution:
    """An installed package; where $QLIB_CORPUS names another environment's packages (for tools), one of those."""
    where = {"path": os.environ["QLIB_CORPUS"].split(os.pathsep)} if os.environ.get("QLIB_CORPUS") else {}
    try:
        return next(iter(metadata.distributions(name=package, **where)))
    except StopIteration:
        raise UserError(
            f"corpus: package '{package}' is not installed; install requirements.lock (`make env`)"
        ) from None


def _files(package: str) -> dict[str, Path]:
    files = _distribution(package).files or []
    return {str(f): Path(f.locate()) for f in files if f.suffix == ".py" and ".." not in f.parts}


def _entries(manifest: Path) -> list[Entry]:
    lines = manifest.read_text(encoding="utf-8").splitlines()
    return [tuple(line.split("\t")) for line in lines if line and not line.startswith("#")]  # type: ignore[misc]


def manifest_hash() -> str:
    """SHA-256 of the manifest, which fixes every byte of the corpus."""
    return hashlib.sha256(MANIFEST.read_bytes()).hexdigest()


def split_entries(split: str, manifest: Path = MANIFEST, without: Sequence[str] = ()) -> list[Entry]:
    """The rows of one split, none of which is read yet.

    Args:
        without: packages to leave out.

    Raises:
        UserError: unknown split.
    """
    if split not in SPLITS:
        raise UserError(f"corpus: split '{split}' is unknown; allowed: {', '.join(SPLITS)}")
    return [entry for entry in _entries(manifest) if entry[0] == split and entry[1] not in without]


def read_entry(entry: Entry, manifest: Path = MANIFEST) -> Document:
    """Read one document and verify it against the manifest.

    Raises:
        UserError: the file is missing or differs from the one the numbers were published on.
    """
    _, package, digest, path = entry
    file = Path(_distribution(package).locate_file(path))
    if not file.is_file():
        raise UserError(f"corpus: {path} of {package} is missing; reinstall requirements.lock (`make env`)")
    data = file.read_bytes()
    if hashlib.sha256(data).hexdigest() != digest:
        raise UserError(
            f"corpus: {path} of {package} {_distribution(package).version} differs from the manifest "
            f"{manifest.name}; install the versions of requirements.lock (`make env`)"
        )
    return Document(path, data.decode("utf-8"))


def read_split(split: str, manifest: Path = MANIFEST) -> list[Document]:
    """Read the documents of one split and verify each against the manifest.

    Raises:
        UserError: unknown split; a file that is missing or differs from the one the numbers were published on.
    """
    return [read_entry(entry, manifest) for entry in split_entries(split, manifest)]


def _candidates() -> list[tuple[str, str, bytes]]:
    rows = []
    for package in PACKAGES:
        for path, file in sorted(_files(package).items()):
            if Path(path).name in GENERATED or not file.is_file():
                continue
            data = file.read_bytes()
            if SMALLEST <= len(data) <= LARGEST and _is_prose(data):
                rows.append((package, path, data))
    return rows


def _is_prose(data: bytes) -> bool:
    """True for UTF-8 source that is mostly words: tables of numbers teach a language model nothing."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    letters = sum(map(text.count, "etaoinsr_"))
    return letters > 0.2 * len(text) and max(map(len, text.splitlines())) < 1000


def _split_of(package: str, data: bytes) -> str:
    """10 % evaluation, 3 % development, 3 % calibration, drawn by content so that no order can leak."""
    if package in TRAIN_ONLY:
        return "train"
    draw = int.from_bytes(hashlib.sha256(b"reference-1" + data).digest()[:4], "big") % 100
    return "evaluation" if draw < 10 else "development" if draw < 13 else "calibration" if draw < 16 else "train"


def build_manifest(target: Path = MANIFEST) -> dict[str, int]:
    """Scan the installed packages, drop exact and near duplicates, split by document and write the manifest.

    Held-out documents are considered first, so that a file like them is dropped from the training text and not
    the other way round; then those of which parts remain in the training text are dropped as well. Returns the number of documents per split.
    """
    from qlib.data.dedupe import keep_distinct, keep_unseen

    rows = [(_split_of(package, data), package, path, data) for package, path, data in _candidates()]
    rows.sort(key=lambda row: (row[0] == "train", row[1], row[2]))
    kept = [rows[i] for i in keep_distinct(_texts(rows))]
    train, held_out = ([row for row in kept if (row[0] == "train") == wanted] for wanted in (True, False))
    kept = [held_out[i] for i in keep_unseen(_texts(held_out), _texts(train))] + train
    header = "# " + " ".join(f"{name}=={metadata.version(name)}" for name in PACKAGES)
    lines = ["\t".join((s, p, hashlib.sha256(d).hexdigest(), path)) for s, p, path, d in kept]
    target.write_text("\n".join([header, *lines, ""]), encoding="utf-8")
    return {split: sum(row[0] == split for row in kept) for split in SPLITS}


def _texts(rows: list[tuple[str, str, str, bytes]]) -> list[str]:
    return [data.decode("utf-8") for *_, data in rows]
