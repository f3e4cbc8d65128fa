"""Depth pruning: whole blocks go, an ordinary smaller model is left, and the block before a gap may be patched.

- by ``influence`` (ShortGPT, Men et al. 2024, arXiv:2403.03853): those go that turn their input least, 1 - cos(input, output);
- ``contiguous`` (Gromov et al. 2024, arXiv:2403.17887): the run of blocks goes whose input and output lie closest by angle;
- ``patch`` (as ReplaceMe, Shopkhoev et al. 2025, arXiv:2505.02819): the MLP before a gap is multiplied by the matrix T that
  best makes up for what is missing, min_T ||Y + M T - H||, with M what the MLP adds, Y the rest of its block's output, and H
  what the uncompressed model has behind the gap. T goes into the weight of down_proj: no part of the model is new.
"""

from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from qlib.errors import UserError
from qlib.models.families import blocks_of, family_of
from qlib.models.load import Subject
from qlib.progress import progress
from qlib.recipe import Context
from qlib.walk import Batch, first_inputs, run_block

__all__ = ["Options", "SCOPE", "CALIBRATES", "NEEDS_FLOAT", "check", "apply", "choose_blocks", "fit_patch"]

SCOPE = "model"
CALIBRATES = True
NEEDS_FLOAT = True
NEEDS_WHOLE = True
MEASURED = 8192  # tokens that influences are measured on, at most


@dataclass(frozen=True)
class Options:
    """Options of a depth pruning pass.

    Args:
        keep_layers: share of the blocks that stays, rounded to whole blocks.
        contiguous: remove neighbouring blocks, as one run; otherwise the least influential ones, wherever they are.
        patch: fit the MLP before each gap to what is missing. A gap at the start has none before it.
        damp: ridge of that fit towards changing nothing, as a share of the mean of the diagonal; more than 0.
    """

    keep_layers: float = field(default=0.653, metadata={"minimum": 0})
    contiguous: bool = False
    patch: bool = True
    damp: float = field(default=0.01, metadata={"minimum": 0})


def check(subject: Subject, options: Options) -> None:
    """Refuse shares that leave no block, or all of them."""
    blocks = len(blocks_of(subject.model))
    if not 0 < options.keep_layers <= 1 or round(options.keep_layers * blocks) < 1:
        least = f"{0.5 / blocks:.3g}"
        raise UserError(f"keep_layers: {options.keep_layers} of {blocks} blocks is not allowed; allowed: {least} to 1")
    if not options.damp > 0:
        raise UserError(f"damp: {options.damp} is not allowed; allowed: more than 0")


@torch.no_grad()
def apply(subject: Subject, options: Options, context: Context) -> Subject:
    """Remove blocks of `subject.model` in place, and adapt its configuration in a copy.

    Returns:
        the subject with the new configuration; its details name the share that stayed (`kept`), and under `depth` the
        blocks that went, the influence of every block, and for each patch the relative error of the hidden states behind
        the gap, with and without it.
    """
    model, blocks = subject.model, blocks_of(subject.model)
    count = len(blocks) - round(options.keep_layers * len(blocks))
    influences, distances = _measure(model, context.ids, count)
    gone = choose_blocks(influences, distances, count, options.contiguous)
    patches = _patch(model, context.ids, gone, options.damp) if options.patch and gone else []
    stay = [index for index in range(len(blocks)) if index not in gone]
    _remove(model, stay)
    config = _shorter(subject.config, stay)
    details = {"kept": {"heads": 1.0, "ffn": 1.0, "layers": len(stay) / len(blocks)}}
    details["depth"] = {"gone": gone, "influence": influences, "patches": patches}
    return replace(subject, config=config, details=subject.details | details)


def choose_blocks(influences: list[float], distances: list[float], count: int, contiguous: bool) -> list[int]:
    """Which `count` blocks go, ascending.

    Args:
        influences: of every block.
        distances: of every run of `count` blocks, by its first block.
    """
    if count == 0:
        return []
    if contiguous:
        first = min(range(len(distances)), key=distances.__getitem__)
        return list(range(first, first + count))
    return sorted(sorted(range(len(influences)), key=influences.__getitem__)[:count])


def _measure(model: nn.Module, ids: list[torch.Tensor], count: int) -> tuple[list[float], list[float]]:
    """Influence of every block, and the angle, in halves of a turn, between input and output of every run of `count` blocks."""
    some, tokens = [], 0
    for batch in ids:
        if tokens < MEASURED:
            some.append(batch)
            tokens += batch.numel()
    batches = first_inputs(model, some)
    states, influences, distances = [_states(batches)], [], []
    for block in progress(0, len(blocks_of(model)), "measuring blocks"):
        batches = run_block(blocks_of(model)[block], batches)
        states.append(_states(batches))
        influences.append(1 - _cosines(states[-2], states[-1]).mean().item())
        if count and len(states) > count:
            cosines = _cosines(states[-1 - count], states[-1]).clamp(-1, 1)
            distances.append((cosines.arccos() / torch.pi).mean().item())
        states = states[-max(count, 1) :]
    return influences, distances


def _states(batches: list[Batch]) -> torch.Tensor:
    return torch.cat([hidden.flatten(0, 1) for hidden, _ in batches])[:MEASURED]


def _cosines(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.cosine_similarity(a.float(), b.float(), dim=-1)


def _patch(model: nn.Module, ids: list[torch.Tensor], gone: list[int], damp: float) -> list[dict[str, Any]]:
    """Patch the block before each gap in place, in the model that earlier gaps and patches left."""
    blocks, found = blocks_of(model), []
    whole = now = first_inputs(model, ids)  # hidden states of the uncompressed model, and of the one that is left
    before: tuple[int, list[Batch]] | None = None  # the last block that stays, and what reaches it
    for index in progress(0, len(blocks), "patching gaps"):
        last = index not in gone  # `whole` must know the block before it is patched
        whole, inputs = run_block(blocks[index], whole), now
        if last:
            before, now = (index, inputs), run_block(blocks[index], now)
        elif before and index + 1 not in gone:
            block = blocks[before[0]]
            error = _distance(now, whole)
            gram, cross = _sums(block, before[1], whole)
            down = block.mlp.down_proj
            down.weight.copy_(fit_patch(gram, cross, damp).t().to(down.weight.device) @ down.weight.double())
            now = run_block(block, before[1])
            found.append({"block": before[0], "error_plain": error, "error": _distance(now, whole)})
    return found


def _sums(block: nn.Module, inputs: list[Batch], wanted: list[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
    """M^T M and M^T (H - Y), float64 `[hidden, hidden]`, over all tokens."""
    added: list[torch.Tensor] = []
    handle = block.mlp.register_forward_hook(lambda module, args, out: added.append(out))
    gram = cross = 0.0
    try:
        for batch, (target, _) in zip(inputs, wanted):
            ((out, _),) = run_block(block, [batch])
            m = added.pop().flatten(0, 1).double()
            rest = (target.double() - out.double()).flatten(0, 1) + m
            gram, cross = gram + m.t() @ m, cross + m.t() @ rest
    finally:
        handle.remove()
    return gram, cross


def fit_patch(gram: torch.Tensor, cross: torch.Tensor, damp: float) -> torch.Tensor:
    """T that minimizes ||M T - R||^2 + ridge ||T - I||^2 from M^T M and M^T R; the ridge is `damp` of the mean energy."""
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    ridge = damp * gram.diagonal().mean().clamp(min=1e-30) * eye
    return torch.linalg.solve(gram + ridge, cross + ridge)


def _distance(found: list[Batch], wanted: list[Batch]) -> float:
    """||found - wanted|| / ||wanted|| over all hidden states."""
    off = sum((a.float() - b.float()).square().sum().item() for (a, _), (b, _) in zip(found, wanted))
    return (off / sum(b.float().square().sum().item() for b, _ in wanted)) ** 0.5


def _remove(model: nn.Module, stay: list[int]) -> None:
    """Keep some blocks, numbered anew, and set the model's configuration."""
    path, _, leaf = family_of(model.config).blocks.rpartition(".")
    blocks = nn.ModuleList(blocks_of(model)[index] for index in stay)
    for index, block in enumerate(blocks):
        block.self_attn.layer_idx = index
    setattr(model.get_submodule(path), leaf, blocks)
    old, config = model.config, _shorter(model.config, stay)
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = config


def _shorter(config: Any, stay: list[int]) -> Any:
    """A copy of a configuration with fewer layers."""
    config = deepcopy(config)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[index] for index in stay]
    config.num_hidden_layers = len(stay)
    return config
