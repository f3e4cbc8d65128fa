"""LoRA (Hu et al. 2021, arXiv:2106.09685): W stays, W + B A alpha / rank is computed, with two thin matrices that learn.

The adapters are those of peft, which also merges them into the weights at the end, if they are not kept beside the codes. What is new is what compressed models need.
A linear of which weights were pruned computes with W + mask * (B A alpha / rank): what is trained is what is merged, and zeros
stay zeros. A packed layer is stood in for by its dequantized weight, which stays as well (QLoRA, Dettmers et al. 2023,
arXiv:2305.14314); the sum is then rounded to the nearest codes of the same grid with the same scales and zeros. So an
adapter that moves a weight by less than half a step leaves it where it was.
"""

from contextlib import contextmanager
from typing import Any, Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from qlib.errors import UserError, nearest
from qlib.layers import PackedLinear, pack, packed_layers
from qlib.models.families import blocks_of, family_of, linears_of
from qlib.models.load import Subject
from qlib.prune.mask import mark_pruned, mask_of
from qlib.quantize.grid import round_to_grid

__all__ = ["check", "describe", "trainable"]

ADAPTER = "default"  # what peft calls an adapter


def check(subject: Subject, options: Any) -> None:
    """Refuse adapters of no size, and linears that the blocks do not have.

    Raises:
        UserError: one line that begins with the option's name.
    """
    for name, least in (("rank", "at least 1"), ("alpha", "more than 0")):
        if getattr(options, name) <= 0:
            raise UserError(f"{name}: {getattr(options, name)} is not allowed; allowed: {least}")
    known = list(dict.fromkeys(name.rpartition(".")[2] for group in family_of(subject.config).groups for name in group))
    unknown = [name for name in options.targets or [] if name not in known]
    if unknown:
        wrong = f"'{unknown[0]}' is no linear of the blocks{nearest(unknown[0], known)}"
        raise UserError(f"targets: {wrong}; allowed: null for all, or some of {', '.join(known)}")
    if options.targets == []:
        raise UserError(f"targets: [] names no linear; allowed: null for all, or some of {', '.join(known)}")


def describe(options: Any) -> dict[str, Any]:
    """The size of the adapters and where they are."""
    return {"rank": options.rank, "alpha": options.alpha, "targets": options.targets, "merged": options.merge}


def _check_apart(packed: dict[str, PackedLinear], names: list[str]) -> None:
    """Refuse to keep adapters apart where they would fill what was pruned, or beside nothing.

    Raises:
        UserError: so it is.
    """
    for name in names:
        if name not in packed:
            raise UserError(f"merge: false keeps an adapter beside codes, but {name} has none; allowed: true")
        if mask_of(packed[name]) is not None:
            raise UserError(f"merge: false would fill what was pruned of {name}; allowed: true")


@contextmanager
def trainable(model: nn.Module, options: Any, seed: int) -> Iterator[Callable[[], None]]:
    """Adapters learn beside linears of the blocks, in fp32, and nothing else does; afterwards they are merged or kept apart.

    Yields what does nothing: there is nothing to do after a step.
    """
    names, packed = _targets(model, options.targets), packed_layers(model)
    if not options.merge:
        _check_apart(packed, names)
    kept: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, layer in packed.items():
        model.set_submodule(name, _dequantized(layer))
    try:
        tuner = _add_adapters(model, names, options, seed)
        try:
            yield lambda: None
        finally:
            with torch.no_grad():
                if not options.merge:
                    kept = {name: _product(model.get_submodule(name)) for name in names}
                    tuner.unload()
                else:
                    tuner.merge_and_unload()
    finally:
        for name, layer in packed.items():
            # Layers without an adapter come back as the very modules they were: a head may share its codes.
            merged = model.get_submodule(name).weight
            model.set_submodule(name, _rounded(layer, merged) if name in names and options.merge else layer)
            if name in kept:
                layer.adapt(*kept[name])


def _targets(model: nn.Module, leaves: list[str] | None) -> list[str]:
    """Names in the model of the linears of all blocks, or of those whose last part is among `leaves`."""
    path = family_of(model.config).blocks
    names = [f"{path}.{index}.{name}" for index, block in enumerate(blocks_of(model)) for name in linears_of(model, block)]
    return [name for name in names if leaves is None or name.rpartition(".")[2] in leaves]


def _add_adapters(model: nn.Module, names: list[str], options: Any, seed: int) -> Any:
    """Put peft's layers into the places of linears and freeze everything but A and B; returns peft's tuner.

    A is random from `seed` and B zero, so that the model begins as it is; the caller's random state is left as it was.
    """
    from peft import LoraConfig, LoraModel

    masks = {name: mask_of(model.get_submodule(name)) for name in names}
    config = LoraConfig(r=options.rank, lora_alpha=options.alpha, target_modules=names, lora_dropout=0.0, bias="none")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tuner = LoraModel(model, config, ADAPTER)
    for name, mask in masks.items():
        if mask is not None:
            _keep_zeros(model.get_submodule(name), mask)
    return tuner


def _keep_zeros(layer: nn.Module, mask: torch.Tensor) -> None:
    """Let a layer of peft compute with, and merge, ``W + mask * (B A alpha / rank)``, `mask` bool `[out, in]`."""
    base, product = layer.get_base_layer(), layer.get_delta_weight

    def delta(adapter: str) -> torch.Tensor:
        with torch.autocast(mask.device.type, enabled=False):  # in fp32 as it is merged, whatever the training computes in
            return product(adapter) * mask

    layer.get_delta_weight = delta
    layer.forward = lambda x: F.linear(x, base.weight + delta(ADAPTER), base.bias)


def _product(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """A `[rank, in]` and B alpha / rank `[out, rank]` of a layer of peft."""
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight * layer.scaling[ADAPTER]


def _dequantized(packed: PackedLinear) -> nn.Linear:
    """A linear with the fp32 weight of a packed layer, its very bias, and its mark if it was pruned."""
    linear = nn.Linear(packed.in_features, packed.out_features, bias=False, device="meta")  # draws no random weight
    linear.weight = nn.Parameter(packed.compressed().dequantize())
    linear.bias = packed.bias
    if mask_of(packed) is not None:
        mark_pruned(linear)
    return linear


@torch.no_grad()
def _rounded(packed: PackedLinear, weight: torch.Tensor) -> PackedLinear:
    """A packed layer like `packed` with the codes nearest to `weight` `[out, in]`: same grid, scales, zeros and bias."""
    old = packed.compressed()
    again = pack(packed, round_to_grid(weight, old.grid, old.scales, old.zeros, old.tensor_scale))
    if mask_of(packed) is not None:
        mark_pruned(again)
    return again
