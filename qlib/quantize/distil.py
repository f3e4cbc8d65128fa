"""Distil on the calibration text alone: tune codes and scales of all packed layers together, end to end.

Methods that round layer by layer or block by block never see what their errors add up to. Here the whole model follows
the uncompressed one's predictions on the windows the passes before have seen, and on nothing else, over and over: about
a dozen times, for then it begins to learn the windows by heart.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import nn

from qlib.errors import UserError
from qlib.layers import packed_layers
from qlib.models.families import blocks_of
from qlib.models.load import Subject, load
from qlib.progress import progress
from qlib.plain_attention import PlainAttention
from qlib.recipe import Context
from qlib.train.fake_quant import pack_again, unpack_for_training
from qlib.train.finetune import distillation_loss

__all__ = ["Options", "SCOPE", "check", "apply"]

SCOPE = "model"
CALIBRATES = True
PLAIN_INTEGERS = True


@dataclass(frozen=True)
class Options:
    """Options of a distillation on the calibration text.

    Args:
        epochs: how many times every calibration window is seen.
        batch: calibration windows of a step.
        peak_lr: learning rate at the end of a warm-up over a twentieth of the steps; then it falls along a cosine to
            nothing.
    """

    epochs: int = field(default=12, metadata={"minimum": 1})
    batch: int = field(default=4, metadata={"minimum": 1})
    peak_lr: float = field(default=1e-3, metadata={"minimum": 0})


def check(subject: Subject, options: Options) -> None:
    """Refuse settings that cannot work.

    Raises:
        UserError: one line that begins with the option's name.
    """
    for name in ("epochs", "batch", "peak_lr"):
        if getattr(options, name) <= 0:
            raise UserError(f"{name}: {getattr(options, name)} is not allowed; allowed: more than 0")


def apply(subject: Subject, options: Options, context: Context) -> Subject:
    """Tune the packed layers, norms and biases of `subject.model`'s blocks in place; embedding and head stay.

    bf16 autocast, AdamW without decay; a layer keeps its grid, its zeros and its mask.

    Raises:
        UserError: no layer is packed.
    """
    model = subject.model
    if not packed_layers(model):
        raise UserError("recipe: pass 'distil' tunes weights on a grid, but none of the passes before put them on one")
    teacher = load(subject.source.name, str(model.device), subject.source.revision).model
    windows = torch.cat(context.ids)
    generator = torch.Generator().manual_seed(context.seed)
    orders = [torch.randperm(len(windows), generator=generator).split(options.batch) for _ in range(options.epochs)]
    batches = [rows for order in orders for rows in order]
    unpack_for_training(model)
    blocks = blocks_of(model)
    float_weights = {id(module.weight) for module in blocks.modules() if isinstance(module, nn.Linear)}  # may be pruned
    parameters = [parameter for parameter in blocks.parameters() if id(parameter) not in float_weights]
    for parameter in parameters:
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=options.peak_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for step in progress(0, len(batches), "distilling"):
        optimizer.param_groups[0]["lr"] = options.peak_lr * _share(step, len(batches))
        loss = _loss(model, teacher, windows[batches[step]].to(model.device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    model.requires_grad_(False)
    pack_again(model)
    for parameter in parameters:
        parameter.data = parameter.data.bfloat16()
    return subject


def _share(step: int, steps: int) -> float:
    """Of the peak learning rate."""
    warmup = max(steps // 20, 1)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def _loss(model: nn.Module, teacher: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Divergence of the model's predictions on ids `[rows, tokens]` from the teacher's."""
    with torch.no_grad():
        wanted = teacher(input_ids=ids, use_cache=False).logits
    with PlainAttention(), torch.autocast(ids.device.type, dtype=torch.bfloat16):
        return distillation_loss(model(input_ids=ids, use_cache=False).logits, wanted)
