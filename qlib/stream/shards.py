"""The shards of a hub model on this disk: those in use and the one that comes next; the others are not there."""

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from qlib.stream.hub_client import Repository

__all__ = ["Shards", "Step"]

#: What is read next, under a name, and the files it lies in.
Step = tuple[str, list[Path]]


class Shards:
    """Fetches each file before it is read, one ahead in a thread, and removes it when neither this step nor the next reads it.

    A file that is read again later (after a pass that plans) is fetched again. On disk are the files of one step, of
    which a block has seldom more than two, and one more.

    Args:
        folder: where they lie; nobody else writes there.
    """

    def __init__(self, repository: Repository, folder: Path) -> None:
        self.repository, self.folder = repository, folder
        self.steps: list[Step] = []
        self.at = 0
        self.coming: dict[Path, Future] = {}
        self.stopped = threading.Event()
        self.pool = ThreadPoolExecutor(1, "shards")

    def expect(self, steps: list[Step]) -> None:
        """Say in which order will be read from now on; only what is fetched ahead depends on it."""
        if not self.coming:
            for left in self.folder.rglob("*.incomplete"):  # of a call that was killed; nothing goes on from it
                left.unlink()
        self.steps, self.at = steps, 0

    def brings(self, file: Path) -> bool:
        """Whether this is one of its files."""
        return file.is_relative_to(self.folder)

    def need(self, step: Step) -> None:
        """Wait until the files of a step are there, and go on with the next one in the background.

        Raises:
            UserError: one cannot be fetched or written, or is not what the hub says; it names the file.
        """
        name, files = step
        self.at = next((at for at in range(self.at, len(self.steps)) if self.steps[at][0] == name), self.at)
        later = (file for _, more in self.steps[self.at + 1 :] for file in more if file not in files)
        ahead = [file for file in later][:1]
        self._drop({*files, *ahead})
        for file in files:
            begun = self.coming.get(file)
            if begun and begun.done() and begun.exception():
                del self.coming[file]  # whatever was wrong while nobody needed it may have passed
        for file in [*files, *ahead]:
            if file not in self.coming:
                self.coming[file] = self.pool.submit(self._fetch, file)
        for file in files:
            self.coming[file].result()

    def close(self) -> None:
        """Give up what is still being fetched. What is on disk stays."""
        self.stopped.set()
        self.pool.shutdown(cancel_futures=True)

    def _fetch(self, file: Path) -> None:
        from huggingface_hub.utils import tqdm

        stopped = self.stopped

        class Bar(tqdm):
            """Shows nothing, but is asked often enough to end a transfer."""

            def __init__(self, *args: object, **options: object) -> None:
                super().__init__(*args, **options | {"disable": True})

            def update(self, n: float | None = 1) -> None:
                if stopped.is_set():
                    raise InterruptedError

        self.repository.fetch(str(file.relative_to(self.folder)), self.folder, Bar)

    def _drop(self, keep: set[Path]) -> None:
        for file in self.coming.keys() - keep:
            begun = self.coming.pop(file)
            if not begun.cancel():
                begun.exception()  # wait for it
        for name in self.repository.files:
            if (file := self.folder / name) not in keep:
                file.unlink(missing_ok=True)
