"""Go through a model block by block: what reaches a block is there, it is compressed, its output is handed on.

Memory is bounded by one block and the calibration activations, whatever the depth.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Callable, Iterator, Mapping

import torch
from torch import nn

from qlib.models.families import blocks_of, family_of
from qlib.plain_attention import PlainAttention
from qlib.progress import progress

__all__ = ["walk", "Visit", "Blocks", "feed_groups", "first_inputs", "run_block", "Batch"]

#: Hidden states `[rows, tokens, hidden]` on their way through the blocks, and the other arguments of a block.
Batch = tuple[torch.Tensor, dict[str, Any]]
#: Takes the inputs `[tokens, in]` of one group of linears.
Feed = Callable[[torch.Tensor], Any]


@dataclass
class Visit:
    """One block, while the walk stands before it.

    Attributes:
        index, path: number and name of the block. block: to be changed in place.
        inputs: from the blocks before it as they now are; empty without calibration text.
        targets: this block's outputs `[rows, tokens, hidden]` in the model as it was before the walk, if asked for.
        runs: whether the block is run once it is compressed; if not, its codes need no kernel's order.
    """

    index: int
    path: str
    block: nn.Module
    inputs: list[Batch]
    targets: list[torch.Tensor] | None
    runs: bool = True


class Blocks:
    """How a walk gets at the blocks of a model, here one in memory, and hands hidden states on.

    A model whose blocks lie on disk has another one as its attribute `blocks_on_disk`, see `qlib.stream`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def first(self, ids: list[torch.Tensor]) -> list[Batch]:
        """What reaches the first block."""
        return first_inputs(self.model, ids)

    @contextmanager
    def open(self, index: int) -> Iterator[nn.Module]:
        """A block with its weights, as long as the context lasts."""
        yield blocks_of(self.model)[index]

    def run(self, block: nn.Module, batches: list[Batch]) -> list[Batch]:
        """What the block makes of its inputs."""
        return run_block(block, batches)


def walk(model: nn.Module, ids: list[torch.Tensor], targets: bool = False, label: str = "compressing") -> Iterator[Visit]:
    """Visit every block in the order they run; the next one sees the outputs of this one as it was left.

    Args:
        ids: token ids `[rows, tokens]` of each calibration batch; empty for methods that need no data.
        targets: also run every block as it was, on inputs from blocks as they were.
    """
    blocks: Blocks = getattr(model, "blocks_on_disk", None) or Blocks(model)
    inputs = blocks.first(ids) if ids else []
    exact, count = inputs, len(blocks_of(model))
    for index in progress(0, count, label):
        with blocks.open(index) as block:
            exact = blocks.run(block, exact) if targets else []
            path = f"{family_of(model.config).blocks}.{index}"
            yield Visit(index, path, block, inputs, [hidden for hidden, _ in exact] if targets else None)
            if inputs and index + 1 < count:
                inputs = blocks.run(block, inputs)


def feed_groups(block: nn.Module, inputs: list[Batch], feeds: Mapping[tuple[str, ...], Feed]) -> None:
    """Run a block and pass what reaches each group of linears, flattened to `[tokens, in]`, to the group's feed.

    Args:
        feeds: by the names of the group, in the order the groups run: behind the last one nothing is computed.
    """
    if inputs and feeds:
        with _listening(block, feeds):
            for batch in inputs:
                try:
                    run_block(block, [batch])
                except _Reached:
                    pass


class _Reached(Exception):
    """Ends a forward pass once what was waited for has been reached."""


@torch.no_grad()
def first_inputs(model: nn.Module, ids: list[torch.Tensor]) -> list[Batch]:
    """Hidden states and keyword arguments with which the first block is called."""
    batches: list[Batch] = []

    def catch(module: nn.Module, args: tuple, kwargs: dict) -> None:
        batches.append((args[0] if args else kwargs.pop("hidden_states"), kwargs))
        raise _Reached

    handle = blocks_of(model)[0].register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for batch in ids:
            try:
                model(input_ids=batch.to(model.device), use_cache=False)
            except _Reached:
                pass
    finally:
        handle.remove()
    return batches


@torch.no_grad()
def run_block(block: nn.Module, batches: list[Batch]) -> list[Batch]:
    """Run one block over all batches; older blocks return a tuple, newer ones the hidden states.

    Hidden states that lie elsewhere, in a mapped file while the block is on a GPU, are brought to the block.
    """
    where = next(block.parameters()).device
    with PlainAttention():
        outputs = [(block(hidden.to(where), **kwargs), kwargs) for hidden, kwargs in batches]
    return [(out[0] if isinstance(out, tuple) else out, kwargs) for out, kwargs in outputs]


@contextmanager
def _listening(block: nn.Module, feeds: Mapping[tuple[str, ...], Feed]) -> Iterator[None]:
    """Pass the inputs of each group's first linear to the group's feed."""

    last = list(feeds)[-1]

    def hook(names: tuple[str, ...], feed: Feed) -> Callable:
        def listen(module: nn.Module, args: tuple) -> None:  # what a hook returns would take the place of the input
            feed(args[0].flatten(0, -2))
            if names == last:
                raise _Reached

        return listen

    handles = [
        block.get_submodule(names[0]).register_forward_pre_hook(hook(names, feed)) for names, feed in feeds.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
