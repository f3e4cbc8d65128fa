"""One virtual environment and one Jupyter kernel for each outside tool, made from a lock of exact versions."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Sequence

from qlib.errors import UserError, nearest
from qlib.paths import find_root, write_atomic

__all__ = ["Environment", "environment_of", "names", "tools_folder"]

BUILD_OPTION = "--config-settings"
SOURCE = Path(__file__).parents[2]  # what the environments import as qlib
STAMP = ".installed"
LAST_LINES = 6
NO_NETWORK = ("NewConnectionError", "Temporary failure in name resolution", "Network is unreachable", "Max retries")


def tools_folder() -> Path:
    """Where the environments lie: $QLIB_TOOLS, else .tools/ in the project."""
    return Path(os.environ.get("QLIB_TOOLS") or find_root() / ".tools").expanduser().resolve()


def names(root: Path | None = None) -> list[str]:
    """Tools that have a lock in params/tools/."""
    return sorted(file.stem for file in ((root or find_root()) / "params" / "tools").glob("*.lock"))


def environment_of(name: str, root: Path | None = None) -> "Environment":
    """The environment of a tool, installed or not.

    Raises:
        UserError: no lock has that name.
    """
    root = root or find_root()
    if name not in names(root):
        known = names(root)
        raise UserError(f"{name}: no such tool{nearest(name, known)}; allowed: {', '.join(known) or 'none has a lock'}")
    return Environment(name, root / "params" / "tools" / f"{name}.lock", tools_folder())


@dataclass(frozen=True)
class Environment:
    """A tool's environment.

    Attributes:
        name: of the tool; its folder, its lock and its kernel (qlib-NAME) are called by it.
        lock: exact versions of everything in it, as pip reads them.
        base: folder of all environments.
    """

    name: str
    lock: Path
    base: Path

    @property
    def folder(self) -> Path:
        return self.base / self.name

    @property
    def kernel(self) -> Path:
        """Folder of the kernel's specification; Jupyter finds it with JUPYTER_PATH=.tools/share/jupyter."""
        return self.base / "share" / "jupyter" / "kernels" / f"qlib-{self.name}"

    @property
    def log(self) -> Path:
        """What pip said last."""
        return self.base / f"{self.name}.log"

    @property
    def state(self) -> str:
        """installed, out of date (the lock has changed since), failed (with this lock), unfinished or not installed."""
        if self.failure:
            return "failed"
        if not self.folder.is_dir():
            return "not installed"
        try:
            stamp = (self.folder / STAMP).read_bytes()
        except OSError:
            return "unfinished"
        return "installed" if stamp == self.lock.read_bytes() else "out of date"

    @property
    def failure(self) -> str:
        """Why the last installation of this very lock failed; empty if it did not."""
        try:
            told = json.loads(self.base.joinpath(f"{self.name}.failed").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return ""
        return told["error"] if told.get("lock") == self.lock_hash() else ""

    @property
    def version(self) -> str:
        """Version of the tool in the lock: of the package that begins with its name, whatever the dashes."""
        for line in self.lock.read_text(encoding="utf-8").splitlines():
            package, _, version = line.partition("==")
            if re.sub(r"[-_.]", "", package.lower()).startswith(self.name.replace("-", "")):
                return version.partition(" ")[0].strip()  # options of pip may follow
        return "?"

    def lock_hash(self) -> str:
        """SHA-256 of the lock."""
        return hashlib.sha256(self.lock.read_bytes()).hexdigest()

    def python(self) -> Path:
        """The interpreter.

        Raises:
            UserError: the environment is not there, or not as the lock has it.
        """
        if self.failure:
            raise UserError(f"{self.name} {self.version} could not be installed: {self.failure}")
        if self.state != "installed":
            raise UserError(f"{self.name} is {self.state}: run `qlib tools install {self.name}`")
        return self.folder / "bin" / "python"

    def python_version(self) -> str:
        """Of the environment, as its configuration has it; empty where there is none."""
        try:
            lines = (self.folder / "pyvenv.cfg").read_text(encoding="utf-8").splitlines()
        except OSError:
            return ""
        return next((line.partition("=")[2].strip() for line in lines if line.startswith("version")), "")

    def disk_bytes(self) -> int:
        """Bytes of all files of the environment, those with several names once."""
        seen = {}
        for folder, _, files in os.walk(self.folder):
            for file in files:
                stat = os.lstat(os.path.join(folder, file))
                seen[stat.st_ino] = stat.st_blocks * 512
        return sum(seen.values())

    def install(self, pip_arguments: Sequence[str] = ()) -> bool:
        """Make the environment, unless it is there as the lock has it. Returns whether anything was done.

        Raises:
            UserError: no Python 3.11, no network, or pip failed; the log is named. What strategies of this tool then say.
        """
        if self.state == "installed":
            return False
        self.remove()
        self.base.mkdir(parents=True, exist_ok=True)
        try:
            self._make(pip_arguments)
        except UserError as error:
            why = str(error).removeprefix(f"{self.name}: ").replace(f" (log: {self.log})", "")
            told = {"lock": self.lock_hash(), "error": " ".join(line.strip() for line in why.splitlines())}
            write_atomic(self.base / f"{self.name}.failed", json.dumps(told, indent=1) + "\n")
            raise
        return True

    def _make(self, pip_arguments: Sequence[str]) -> None:
        """Environment, packages, kernel, and the stamp last."""
        python = self.folder / "bin" / "python"
        with self.log.open("wb") as log:
            self._call([_interpreter(), "-m", "venv", str(self.folder)], log, "venv")
            options = ["--disable-pip-version-check", "--no-input", "--progress-bar", "off", *pip_arguments]
            if BUILD_OPTION in self.lock.read_text(encoding="utf-8"):
                options.append("--no-cache-dir")  # pip would take a wheel it built without them, or on another processor
            self._call([str(python), "-m", "pip", "install", *options, "-r", str(self.lock)], log, "pip")
        ask = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        packages = Path(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip())
        (packages / "qlib-source.pth").write_text(f"{SOURCE}\n", encoding="utf-8")
        argv = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        specification = {"argv": argv, "display_name": f"qlib: {self.name}", "language": "python"}
        self.kernel.mkdir(parents=True, exist_ok=True)
        write_atomic(self.kernel / "kernel.json", json.dumps(specification, indent=1) + "\n")
        write_atomic(self.folder / STAMP, self.lock.read_bytes())

    def _call(self, command: list[str], log, what: str) -> None:
        try:
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL).returncode
        except OSError as error:
            raise UserError(f"{self.name}: cannot start {command[0]}: {error.strerror}") from None
        if code:
            lines = self.log.read_text(errors="replace").splitlines()
            if any(mark in line for mark in NO_NETWORK for line in lines):
                raise UserError(f"{self.name}: no network: pip could not reach its index (log: {self.log})")
            last = [line for line in lines if line.strip()][-LAST_LINES:]
            raise UserError("\n    ".join([f"{self.name}: {what} failed with code {code} (log: {self.log})", *last]))

    def remove(self) -> bool:
        """Delete the environment and its kernel, the stamp first. Returns whether there was anything."""
        there = self.folder.is_dir()
        (self.folder / STAMP).unlink(missing_ok=True)
        self.base.joinpath(f"{self.name}.failed").unlink(missing_ok=True)
        for folder in (self.folder, self.kernel):
            if folder.is_dir():
                shutil.rmtree(folder)
        return there


def _interpreter() -> str:
    """Python 3.11: the tools' wheels are for it."""
    found = sys.executable if sys.version_info[:2] == (3, 11) else shutil.which("python3.11")
    if not found:
        raise UserError("tools: Python 3.11 is needed to make their environments, and there is no python3.11 here")
    return found
