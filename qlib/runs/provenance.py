"""Where a number comes from: commit, packages, processor, memory. Fast: it imports none of the packages it names."""

import hashlib
import os
import platform
import re
import subprocess
from functools import lru_cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qlib.errors import UserError
from qlib.paths import find_root

__all__ = ["provenance", "torch_device", "device_class", "gpu", "version_of", "PACKAGES"]

#: What decides numbers; the lock's hash covers the rest.
PACKAGES = (
    "torch", "transformers", "tokenizers", "safetensors", "numpy", "auto-gptq", "lm-eval", "papermill", "nbconvert",
)  # fmt: skip
#: Import names that differ from the name of the distribution.
DISTRIBUTIONS = {"yaml": "PyYAML", "sklearn": "scikit-learn", "PIL": "pillow", "auto_gptq": "auto-gptq"}
GPUS = Path("/proc/driver/nvidia/gpus")


def provenance(seed: int | None = None, started: str | None = None, finished: str | None = None) -> dict[str, Any]:
    """Everything but the model and the data that a number depends on."""
    commit, dirty = _commit()
    return {
        "commit": commit,
        "dirty": dirty,
        "lock_sha256": _lock_hash(),
        "packages": {name: version for name in PACKAGES if (version := version_of(name))},
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": int(os.environ.get("OMP_NUM_THREADS") or _usable_cores()),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "gpu": gpu(),
        "seed": seed,
        "started": started,
        "finished": finished,
    }


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def version_of(package: str) -> str | None:
    """Version of the distribution that provides an import name, None if it is not installed."""
    try:
        return metadata.version(DISTRIBUTIONS.get(package, package))
    except metadata.PackageNotFoundError:
        providers = _distributions().get(package)
        return metadata.version(providers[0]) if providers else None


@lru_cache(maxsize=1)
def _distributions() -> dict[str, list[str]]:
    return dict(metadata.packages_distributions())


def _commit() -> tuple[str | None, bool | None]:
    """Commit of the project, and whether tracked files other than reports differ from it."""
    try:
        root = find_root()
        ask = {"cwd": root, "capture_output": True, "text": True, "timeout": 20, "check": True}
        commit = subprocess.run(["git", "rev-parse", "HEAD"], **ask).stdout.strip()
        sources = ["--", ".", ":(exclude)reports"]
        changed = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no", *sources], **ask).stdout
        return commit, bool(changed.strip())
    except (UserError, OSError, subprocess.SubprocessError):
        return None, None


def _lock_hash() -> str | None:
    try:
        return hashlib.sha256((find_root() / "requirements.lock").read_bytes()).hexdigest()
    except (UserError, OSError):
        return None


def _cpu() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


@lru_cache(maxsize=1)
def gpu() -> str | None:
    """Name of the first GPU that torch would use, None without one; does not import torch."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden in ("", "-1") or not _torch_has_cuda():
        return None
    for file in sorted(GPUS.glob("*/information")):
        found = re.search(r"^Model:\s*(.+)$", file.read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    try:  # the driver's folder is hidden in some containers
        ask = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names = subprocess.run(ask, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    return names[0].strip() if names else None


def _torch_has_cuda() -> bool:
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    return bool(re.search(r"^cuda\b.*=\s*'", text, re.MULTILINE))


def torch_device() -> str:
    """Where notebooks compute: "cpu" unless `qlib run --device cuda` (or $QLIB_DEVICE) asks for the GPU.

    Raises:
        UserError: something else is asked for, or there is no GPU that torch could use.
    """
    asked = os.environ.get("QLIB_DEVICE") or "cpu"
    if asked not in ("cpu", "cuda"):
        raise UserError(f"device: '{asked}' is unknown; allowed: cpu, cuda")
    if asked == "cuda" and not gpu():
        raise UserError("device: cuda is asked for, but there is no GPU that this build of torch can use")
    return asked


def device_class() -> str:
    """Folder name of the device that notebooks compute on: "cpu", or the GPU's, e.g. "nvidia-h200"."""
    name = gpu() if torch_device() == "cuda" else None
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") if name else "cpu"
