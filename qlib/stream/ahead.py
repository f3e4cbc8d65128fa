"""Get the next block from the disk while the present one is worked on."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from qlib.stream.source import Stored

__all__ = ["ReadAhead", "to_device"]


class ReadAhead:
    """Reads the tensors of one block after the other.

    For another device than the CPU the next block is read into main memory by a thread. For the CPU that would be a
    second block in the memory that is scarce: there the system is asked to have it in its page cache, which it may drop.
    """

    def __init__(self, stored: Stored, device: torch.device) -> None:
        self.stored, self.device = stored, device
        self.thread = ThreadPoolExecutor(1, "read-ahead") if device.type != "cpu" else None
        self.begun: tuple[str, Future] | None = None

    def read(self, prefix: str, then: str) -> dict[str, torch.Tensor]:
        """The tensors whose names begin with `prefix`, on the device; those that begin with `then` are read next.

        Raises:
            UserError: as `Stored.read`.
        """
        begun, self.begun = self.begun, None
        found = begun[1].result() if begun and begun[0] == prefix else self.stored.read(prefix)
        if self.thread:
            self.begun = then, self.thread.submit(self.stored.read, then)
        else:
            self.stored.announce(then)
        return {name: tensor.to(self.device) for name, tensor in found.items()}


def to_device(arguments: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """What a block is called with beside hidden states, on a device; tuples of tensors stay tuples."""

    def moved(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(moved, value))
        return value.to(device) if isinstance(value, torch.Tensor) else value

    return {name: moved(value) for name, value in arguments.items()}
