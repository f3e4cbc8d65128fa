"""Go through a model block by block: capture what reaches each linear, solve it, hand the compressed block's output on.

Memory is bounded by one block and the calibration activations, whatever the depth.
"""

from contextlib import contextmanager
from typing import Any, Callable, Iterator

import torch
from torch import nn

from qlib.models.families import blocks_of, family_of
from qlib.progress import progress

__all__ = ["walk", "first_inputs", "run_block", "Batch"]

#: Hidden states `[rows, tokens, hidden]` on their way through the blocks, and the other arguments of a block.
Batch = tuple[torch.Tensor, dict[str, Any]]
#: Makes the statistic of one group of linears, fed with inputs `[tokens, in]`.
Feed = Callable[[torch.Tensor], None]


@torch.no_grad()
def walk(
    model: nn.Module,
    ids: list[torch.Tensor],
    open_group: Callable[[int, nn.Module, tuple[str, ...]], Feed | None],
    close_group: Callable[[int, nn.Module, tuple[str, ...]], None],
    label: str = "compressing",
) -> None:
    """Visit every group of linears that share an input, in the order they run.

    Args:
        ids: token ids `[rows, tokens]` of each calibration batch; empty for methods that need no data.
        open_group: called with block number, block and names before the block runs; returns what to feed with the
            group's inputs, or None.
        close_group: called after the block ran; replaces the linears of the group in place.
    """
    groups = family_of(model.config).groups
    batches = first_inputs(model, ids) if ids else []
    blocks = blocks_of(model)
    for index in progress(0, len(blocks), label):
        block = blocks[index]
        feeds = {names: open_group(index, block, names) for names in groups}
        if batches and any(feeds.values()):
            with _listening(block, feeds):
                run_block(block, batches)
        for names in groups:
            close_group(index, block, names)
        if batches and index + 1 < len(blocks):
            batches = run_block(block, batches)


class _Reached(Exception):
    """Ends a forward pass once the first block has been reached."""


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


def run_block(block: nn.Module, batches: list[Batch]) -> list[Batch]:
    """Run one block over all batches; older blocks return a tuple, newer ones the hidden states."""
    outputs = [(block(hidden, **kwargs), kwargs) for hidden, kwargs in batches]
    return [(out[0] if isinstance(out, tuple) else out, kwargs) for out, kwargs in outputs]


@contextmanager
def _listening(block: nn.Module, feeds: dict[tuple[str, ...], Feed | None]) -> Iterator[None]:
    """Pass the inputs of each group's first linear, flattened to `[tokens, in]`, to the group's statistic."""

    def hook(feed: Feed) -> Callable:
        def listen(module: nn.Module, args: tuple) -> None:  # what a hook returns would take the place of the input
            feed(args[0].flatten(0, -2))

        return listen

    listened = [(names[0], feed) for names, feed in feeds.items() if feed]
    handles = [block.get_submodule(name).register_forward_pre_hook(hook(feed)) for name, feed in listened]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
