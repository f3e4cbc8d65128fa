"""One commit of a repository of the hub, through huggingface_hub: what it holds, headers, files that are checked by hash."""

import errno
import hashlib
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator

from qlib.errors import UserError

__all__ = ["Blob", "Repository", "explained", "look_up", "sha256_of"]

#: What the operating system says where a file cannot be written.
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO)


@dataclass(frozen=True)
class Blob:
    """A file as the hub knows it.

    Attributes:
        size: in bytes. hash: SHA-256 of what lies in large file storage, git's SHA-1 of what lies in git.
    """

    size: int
    hash: str

    def hash_of(self, file: Path) -> str:
        """The hash of a file on disk, of the same kind."""
        if len(self.hash) == 64:
            return sha256_of(file)
        return hashlib.sha1(f"blob {file.stat().st_size}\0".encode() + file.read_bytes()).hexdigest()


def sha256_of(file: Path) -> str:
    """SHA-256 of the content of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@dataclass(frozen=True)
class Repository:
    """A model at one commit, and its files by name."""

    model: str
    commit: str
    files: dict[str, Blob]

    def fetch(self, name: str, folder: Path, bar: type | None = None) -> Path:
        """Download a file into a folder, or find it there, and compare it with what the hub says of it.

        Args:
            bar: a class as tqdm's, which is told how far it is.

        Raises:
            UserError: it cannot be fetched or written, or is not what the hub says; then it is removed.
        """
        from huggingface_hub import hf_hub_download

        with explained(self.model, folder / name):
            file = Path(hf_hub_download(self.model, name, revision=self.commit, local_dir=folder, tqdm_class=bar))
            told, size, found = self.files[name], file.stat().st_size, self.files[name].hash_of(file)
        if (size, found) != (told.size, told.hash):
            file.unlink()
            wrong = f"{size} bytes, hash {found[:12]}...; the hub says {told.size} bytes, {told.hash[:12]}..."
            raise UserError(f"{self.model}/{name}: was not fetched as it is ({wrong}); it was removed, repeat the command")
        return file

    def header(self, name: str) -> dict[str, Any]:
        """The header of a safetensors file as its JSON says it; of the file no more is fetched.

        Raises:
            UserError: it cannot be fetched, or is none.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.errors import SafetensorsParsingError

        try:
            with explained(self.model, Path(name)):
                told = HfApi().parse_safetensors_file_metadata(self.model, name, revision=self.commit)
        except (SafetensorsParsingError, KeyError, TypeError):
            size = self.files[name].size
            raise UserError(f"{self.model}/{name}: is truncated or no safetensors file ({size} bytes, no header)") from None
        tensors = {
            tensor: {"dtype": one.dtype, "shape": list(one.shape), "data_offsets": list(one.data_offsets)}
            for tensor, one in told.tensors.items()
        }
        return {"__metadata__": told.metadata} | tensors


def look_up(model: str, revision: str) -> Repository:
    """The commit that a branch, a tag or a hash stands for now, and the files in it.

    Raises:
        UserError: no such repository or revision, no access, no network.
    """
    from huggingface_hub import HfApi

    with explained(model, revision=revision):
        info = HfApi().model_info(model, revision=revision, files_metadata=True)
    files = {
        one.rfilename: Blob(one.lfs.size, one.lfs.sha256) if one.lfs else Blob(one.size, one.blob_id)
        for one in info.siblings or []
        if ".." not in one.rfilename.split("/") and not one.rfilename.startswith("/")  # stays where it is put
    }
    return Repository(model, info.sha, files)


@contextmanager
def explained(model: str, file: Path | None = None, revision: str = "") -> Iterator[None]:
    """Say in one line what went wrong between us and the hub."""
    from huggingface_hub.errors import (
        GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError,
    )  # fmt: skip

    unreachable = HfHubHTTPError.__bases__[0]  # of the HTTP library below, which differs between versions
    try:
        yield
    except GatedRepoError:
        raise UserError(
            f"model: '{model}' is gated: ask for access on its page of the hub, then `hf auth login` or set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"model: the hub has no '{model}', or it is private (`hf auth login` or HF_TOKEN); or did you mean a folder?"
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"revision: '{model}' has no '{revision}'; allowed: a branch, a tag or a commit") from None
    except (unreachable, OSError, ValueError) as error:
        if type(error).__module__ == "builtins" and getattr(error, "errno", None) in UNWRITABLE:
            raise UserError(f"{file}: cannot be written ({error.strerror}); finished blocks are kept") from None
        cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
        reason = str(cause).strip().splitlines()[:1] or [type(cause).__name__]
        what = f"{model}/{file.name}" if file else f"model: '{model}'"
        raise UserError(f"{what}: could not be fetched from the hub ({reason[0]}); finished blocks are kept") from None
