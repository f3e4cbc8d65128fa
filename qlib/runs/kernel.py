"""The kernel of one run: started with one interpreter and a private environment, watched and ended from outside."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

__all__ = ["Kernel", "MEMORY_METHOD"]

MEMORY_METHOD = "anonymous resident memory of the kernel and its children, highest of samples every 0.2 s"


class Kernel:
    """Makes the kernel managers that papermill asks for, and remembers the process.

    Args:
        folder: for connection file, history and log; removed by the caller.
        cwd: working directory of the notebook.
        environment: variables on top of the runner's.
        python: the interpreter; None: this one. Strategies of an outside tool run with that of the tool.
    """

    def __init__(self, folder: Path, cwd: Path, environment: dict[str, str], python: Path | None = None):
        self.folder, self.cwd = folder, cwd
        self.environment = os.environ | {"IPYTHONDIR": str(folder), "PYDEVD_DISABLE_FILE_VALIDATION": "1"} | environment
        self.python = str(python or sys.executable)
        self.process: Any = None
        self.peak_bytes = 0
        self._ended = False
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def log(self) -> Path:
        """What the kernel wrote past the notebook, e.g. when it crashed."""
        return self.folder / "kernel.log"

    def manager_class(self) -> type:
        """A kernel manager for papermill; the kernel is that of the interpreter, whatever the notebook names."""
        from jupyter_client.kernelspec import KernelSpec
        from jupyter_client.manager import AsyncKernelManager

        kernel = self

        class Manager(AsyncKernelManager):
            def __init__(self, **kwargs: Any):
                super().__init__(**kwargs)
                self.connection_file = str(kernel.folder / f"kernel-{os.urandom(4).hex()}.json")
                argv = [kernel.python, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
                self._kernel_spec = KernelSpec(argv=argv, display_name="Python 3", language="python")

            async def start_kernel(self, **kwargs: Any) -> None:
                with kernel.log.open("ab") as log:
                    kwargs |= {"env": kernel.environment, "cwd": str(kernel.cwd), "stdout": log, "stderr": log}
                    await super().start_kernel(**kwargs)
                kernel.process = self.provisioner.process
                if kernel._ended:
                    kernel.end()

        return Manager

    def sample_memory(self) -> None:
        """Add up the memory of the kernel and its children, and keep the highest sum."""
        if self.process is not None and self.process.returncode is None:
            self.peak_bytes = max(self.peak_bytes, sum(map(_anonymous, self._tree())))

    def end(self) -> None:
        """Kill the kernel and its children, also one that is about to start."""
        self._ended = True
        for pid in reversed(self._tree()):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def death(self) -> str:
        """How the kernel process ended, in words."""
        code = self.process.poll() if self.process is not None else None
        if code is None:
            return "the kernel stopped answering"
        if code >= 0:
            return f"the kernel exited with code {code}"
        hint = ", perhaps out of memory" if code == -signal.SIGKILL else ""
        return f"the kernel was killed by signal {-code}{hint}"

    def _tree(self) -> list[int]:
        import psutil

        if self.process is None or self.process.returncode is not None:
            return []
        try:
            root = psutil.Process(self.process.pid)
            return [root.pid, *(child.pid for child in root.children(recursive=True))]
        except psutil.Error:
            return []


def _anonymous(pid: int) -> int:
    """Resident anonymous bytes of a process: mapped files are not memory use. All resident memory off Linux."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        if not Path("/proc/self/status").exists():
            import psutil

            return psutil.Process(pid).memory_info().rss if psutil.pid_exists(pid) else 0
    return 0
