"""Where things lie: the project's root, a strategy's run folder, the cache; and how a file is written in one step."""

import hashlib
import os
import re
import tempfile
from pathlib import Path

from qlib.errors import UserError

__all__ = ["find_root", "slug", "run_folder", "cache_folder", "write_atomic", "shipped_model", "MODELS", "REFERENCE"]

#: The quality subject that ships with the package; "reference" in a strategy file means this one.
REFERENCE = "reference-2"
#: Where it lies, beside those that came before it: published numbers name their subject.
MODELS = Path(__file__).parent / "models"


def find_root(start: Path | str | None = None) -> Path:
    """The first folder from `start` (default: the current one) upwards that holds both `params/` and `notebooks/`.

    Raises:
        UserError: there is none.
    """
    begin = Path(start or Path.cwd()).resolve()
    for folder in (begin, *begin.parents):
        if (folder / "params").is_dir() and (folder / "notebooks").is_dir():
            return folder
    raise UserError(f"{begin}: neither this folder nor one above it holds params/ and notebooks/; go to the project")


def shipped_model(model: str) -> str | None:
    """The name of a model that ships with the package, "reference" being the newest; None for all others."""
    name = REFERENCE if model == "reference" else model
    return name if re.fullmatch(r"reference-\d+", name) and (MODELS / name / "config.json").is_file() else None


def slug(model: str, root: Path | None = None) -> str:
    """A folder name for `model`: ``reference-2``, ``Qwen--Qwen2.5-0.5B`` (hub id), ``name-1a2b3c4d`` (folder)."""
    if shipped := shipped_model(model):
        return shipped
    folder = Path(root or Path.cwd(), Path(model).expanduser())
    if folder.is_dir():
        where = str(folder.resolve())
        return f"{_safe(folder.resolve().name)}-{hashlib.sha256(where.encode()).hexdigest()[:8]}"
    return _safe(model.replace("/", "--"))


def _safe(name: str) -> str:
    return re.sub(r"[^\w.+-]", "-", name).lstrip(".-") or "model"


def run_folder(runs: Path, model: str, device: str, strategy: str) -> Path:
    """Where the record of `strategy` on `model` and `device` ("cpu", "nvidia-h200") lies."""
    return Path(runs) / slug(model) / device / strategy


def cache_folder() -> Path:
    """Folder of what may be computed again: $QLIB_CACHE, else the user's cache folder; created if missing."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("QLIB_CACHE") or Path(base) / "qlib")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_atomic(path: Path, data: str | bytes) -> Path:
    """Write `data` (text as UTF-8) to `path` so that a reader, or a crash, sees the old file or the whole new one."""
    path = Path(path)
    content = data.encode("utf-8") if isinstance(data, str) else data
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
