"""An object in a process of its own, so that what it costs can be told from what anything else costs."""

import multiprocessing
from typing import Any

__all__ = ["Remote"]


class Remote:
    """Makes ``kind(*arguments)`` in a fresh process; ``remote(method, *given)`` calls a method of it there.

    Raises:
        RuntimeError: the process ended without an answer; and whatever the method raises.
    """

    def __init__(self, kind: type, *arguments: Any):
        context = multiprocessing.get_context("spawn")
        self.pipe, far = context.Pipe()
        self.process = context.Process(target=_serve, args=(far, kind, arguments), daemon=True)
        self.process.start()
        far.close()

    def __call__(self, method: str, *arguments: Any) -> Any:
        self.pipe.send((method, arguments))
        try:
            fine, answer = self.pipe.recv()
        except EOFError:
            self.process.join()
            code = self.process.exitcode
            raise RuntimeError(f"a training process ended without an answer, exit code {code}") from None
        if not fine:
            raise answer
        return answer

    def close(self) -> None:
        self.process.terminate()
        self.process.join()


def _serve(pipe: Any, kind: type, arguments: tuple) -> None:
    served = kind(*arguments)
    while True:
        method, given = pipe.recv()
        try:
            pipe.send((True, getattr(served, method)(*given)))
        except Exception as error:  # travels to who asked, and is raised there
            pipe.send((False, error))
