"""The blocks of a model on disk, for a walk: one at a time in memory, hidden states in memory or mapped from files."""

import copy
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterable, Iterator

import torch
from safetensors import safe_open
from torch import nn

from qlib.errors import UserError
from qlib.models.families import blocks_of, family_of
from qlib.stream.ahead import ReadAhead, to_device
from qlib.stream.files import write_tensors
from qlib.stream.source import Stored
from qlib.walk import Batch, Blocks, first_inputs, run_block

__all__ = ["BlocksOnDisk"]

PASSING = "passing"  # name of hidden states that no later run goes on from


class BlocksOnDisk(Blocks):
    """Blocks that are read when they are opened and forgotten when they are closed.

    Args:
        model: its weights lie on the meta device.
        work: folder for hidden states.
        mapped: keep hidden states in files there alone, and map them; else they are in memory, too.
        device: where blocks are put, and hidden states that are not mapped.
    """

    def __init__(
        self, model: nn.Module, stored: Stored, work: Path, mapped: bool = False, device: str | torch.device = "cpu"
    ) -> None:
        super().__init__(model)
        self.stored, self.work, self.mapped, self.device = stored, work, mapped, torch.device(device)
        self.ahead = ReadAhead(stored, self.device)

    def first(self, ids: list[torch.Tensor]) -> list[Batch]:
        """What reaches the first block, `[rows, tokens, hidden]` of each batch; the embedding stays on disk."""
        arguments: list[dict[str, Any]] = []

        def hidden() -> Iterator[torch.Tensor]:
            for batch in ids:
                [(states, kwargs)] = first_inputs(self.model, [batch])
                arguments.append(to_device(kwargs, self.device))
                yield states.to(self.device)

        with self._embedding():
            shapes = [(*batch.shape, self.model.config.hidden_size) for batch in ids]
            return list(zip(self._keep(hidden(), shapes), arguments))

    @contextmanager
    def open(self, index: int) -> Iterator[nn.Module]:
        """Put the block, with its weights, into the model as long as the context lasts."""
        blocks, name = blocks_of(self.model), family_of(self.model.config).blocks
        prefix, then = f"{name}.{index}.", f"{name}.{index + 1}."
        empty = blocks[index]
        block = copy.deepcopy(empty)
        # The block alone may hold its weights, so that each of them is free once codes have taken its place.
        tensors = self.ahead.read(prefix, then)
        block.load_state_dict({name.removeprefix(prefix): tensors.pop(name) for name in list(tensors)}, assign=True)
        blocks[index] = block
        try:
            yield block
        finally:
            blocks[index] = empty
            block.to("meta")  # whoever still holds it holds no weights

    def run(self, block: nn.Module, batches: list[Batch], name: str | None = None) -> list[Batch]:
        """What the block makes of its inputs; under a `name` for `read` to find it again."""
        outputs = (run_block(block, [batch])[0][0] for batch in batches)
        shapes = [tuple(hidden.shape) for hidden, _ in batches]
        return list(zip(self._keep(outputs, shapes, name), [kwargs for _, kwargs in batches]))

    def read(self, name: str, like: list[Batch]) -> list[Batch]:
        """What `run` kept under a name, with the arguments of the batches `like`."""
        if not like:
            return []
        if not self._file(name).is_file():
            raise UserError(f"{self._file(name)}: is missing; remove the folder that was to be written, and begin again")
        with safe_open(self._file(name), "pt") as file:
            hidden = [file.get_tensor(f"{number:06d}") for number in range(len(like))]
        held = [one if self.mapped else one.to(self.device, copy=True) for one in hidden]
        return [(one, kwargs) for one, (_, kwargs) in zip(held, like)]

    def forget(self, before: int) -> None:
        """Remove what was kept under names that end in a smaller number."""
        for file in self.work.glob("*-*.safetensors"):
            if int(file.stem.rpartition("-")[2]) < before:
                file.unlink()

    def _file(self, name: str) -> Path:
        return self.work / f"{name}.safetensors"

    def _keep(
        self, hidden: Iterable[torch.Tensor], shapes: list[tuple[int, ...]], name: str | None = None
    ) -> list[torch.Tensor]:
        """Take the hidden states of each batch as they are made, into memory, a file, or both."""
        if not self.mapped and name is None:
            return list(hidden)
        kept: list[torch.Tensor] = []

        def passing() -> Iterator[torch.Tensor]:
            for one in hidden:
                if not self.mapped:
                    kept.append(one)
                yield one

        layout = {f"{number:06d}": (torch.bfloat16, shape) for number, shape in enumerate(shapes)}
        write_tensors(self._file(name or PASSING), self.work, layout, passing())
        return kept or [one for one, _ in self.read(name or PASSING, [(None, {})] * len(shapes))]

    @contextmanager
    def _embedding(self) -> Iterator[None]:
        """The embedding, mapped from its file, in the model as long as the context lasts."""
        name = f"{family_of(self.model.config).embedding}.weight"
        embedding = self.model.get_input_embeddings()
        empty, embedding.weight = embedding.weight, nn.Parameter(self.stored.mapped(name), requires_grad=False)
        handle = embedding.register_forward_hook(lambda module, args, rows: rows.bfloat16())
        try:
            yield
        finally:
            handle.remove()
            embedding.weight = empty
