"""Width pruning: attention heads and FFN channels go, equally many in every block; an ordinary smaller model is left.

What stays is chosen by how much output error of o_proj and down_proj a removal costs on the calibration text, and these
two linears are refitted by least squares so that the rest takes over (`qlib.prune.structures`; SlimGPT, Ling et al.
2024, arXiv 2412.18110). Later blocks see what the pruned earlier ones hand on.

The costs after compensation were chosen on the development text of reference-1 over |w| ||x|| of a structure (Wanda-sp,
An et al. 2024, arXiv 2312.11983, which also brings FLAP): where a third of the width goes the two are equal within the
noise of the calibration windows, where more goes the former are better with every seed, as are the layer errors. FLAP's
bias, the mean of what was removed, is left out: o_proj and down_proj of Qwen2 have none, and the result shall stay an
ordinary checkpoint.
"""

from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from qlib.errors import UserError
from qlib.models.families import blocks_of
from qlib.models.load import Subject
from qlib.models.shapes import FFN_STEP, kept_width
from qlib.prune.mask import mask_of
from qlib.prune.structures import Gram, channels_of, choose_structures, compensate, output_error
from qlib.recipe import Context
from qlib.walk import feed_groups, walk

__all__ = ["Options", "SCOPE", "CALIBRATES", "NEEDS_FLOAT", "check", "apply"]

SCOPE = "model"
CALIBRATES = True
NEEDS_FLOAT = True
#: Costs of FFN channels are computed anew so often; a head at a time goes in any case.
ROUNDS = 8
QUERIES, KEYS = ("self_attn.q_proj",), ("self_attn.k_proj", "self_attn.v_proj")


@dataclass(frozen=True)
class Options:
    """Options of a width pruning pass.

    Args:
        keep_heads: share of the attention heads that stays; where several share keys and values, in each such group.
        keep_ffn: share of the FFN channels that stays, rounded to a multiple of `multiple_of`.
        compensate: refit the output weights by least squares, so that what stays takes over.
        damp: ridge of the least squares, as a share of the mean of the diagonal; more than 0.
        multiple_of: what the number of FFN channels stays a multiple of; it must divide it. null: 128, which suits every
            group of weights and every kernel, or any number where the model's is none.
    """

    keep_heads: float = field(default=0.653, metadata={"minimum": 0})
    keep_ffn: float = field(default=0.653, metadata={"minimum": 0})
    compensate: bool = True
    damp: float = field(default=0.01, metadata={"minimum": 0})
    multiple_of: int | None = field(default=None, metadata={"minimum": 1})


@dataclass(frozen=True)
class _Part:
    """The structures of one kind in a block.

    Attributes:
        writer: the linear whose inputs they are.
        readers: linears whose outputs they are.
        width: channels of a structure. groups: the group of each structure. quota: how many of a group stay.
    """

    writer: str
    readers: tuple[str, ...]
    width: int
    groups: list[int]
    quota: int


def check(subject: Subject, options: Options) -> None:
    """Refuse shares that leave nothing, and a narrower configuration that the architecture does not allow."""
    if not options.damp > 0:
        raise UserError(f"damp: {options.damp} is not allowed; allowed: more than 0")
    width, multiple = subject.config.intermediate_size, options.multiple_of
    if multiple is not None and (multiple < 1 or width % multiple):
        raise UserError(f"multiple_of: {multiple} is not allowed; allowed: divisors of {width}, the FFN channels of the model")
    config = narrowed_config(subject.config, head_dim_of(subject.model), options)
    try:
        type(config).from_dict(config.to_dict())
    except Exception as error:  # whatever the architecture's own checks raise: the checkpoint could not be loaded
        heads, reason = config.num_attention_heads, " ".join(str(error).split())
        raise UserError(
            f"keep_heads: {options.keep_heads} leaves {heads} heads, which model type '{config.model_type}' "
            f"refuses: {reason}"
        ) from None


def apply(subject: Subject, options: Options, context: Context) -> Subject:
    """Narrow every block of `subject.model` in place, and its configuration in a copy.

    Returns:
        the subject with the new configuration; its details name what stayed (`kept`, `narrowed`) and for each block,
        under `width`, the query heads, the number of FFN channels and the relative errors of the outputs of o_proj and
        down_proj on the calibration text, with and without compensation.
    """
    model, old = subject.model, subject.config
    config = narrowed_config(old, head_dim_of(model), options)
    found = _narrow_blocks(model, _parts(old, config, head_dim_of(model)), options, context)
    _set_config(model, narrowed_config(model.config, head_dim_of(model), options))
    kept = {
        "heads": config.num_attention_heads / old.num_attention_heads,
        "ffn": config.intermediate_size / old.intermediate_size,
        "layers": 1.0,
    }
    details = {"narrowed": _suffix(options), "kept": kept, "width": found}
    return replace(subject, config=config, details=subject.details | details)


def head_dim_of(model: nn.Module) -> int:
    """Width of an attention head."""
    return blocks_of(model)[0].self_attn.head_dim


def narrowed_config(config: Any, head_dim: int, options: Options) -> Any:
    """A copy of a configuration with the dimensions that are left."""
    heads, kv_heads, ffn = kept_width(
        config.num_attention_heads,
        config.num_key_value_heads,
        config.intermediate_size,
        options.keep_heads,
        options.keep_ffn,
        options.multiple_of or FFN_STEP,
    )
    config = deepcopy(config)
    config.num_attention_heads, config.num_key_value_heads = heads, kv_heads
    config.intermediate_size, config.head_dim = ffn, head_dim
    return config


def _parts(old: Any, new: Any, head_dim: int) -> list[_Part]:
    """Heads and channels of a block. Query heads that share keys and values are one group, or all heads are."""
    heads, kv_heads = old.num_attention_heads, old.num_key_value_heads
    shared = heads // kv_heads
    if shared == 1:  # keys and values go with their head
        readers, groups, quota = QUERIES + KEYS, [0] * heads, new.num_attention_heads
    else:
        readers, groups, quota = QUERIES, [head // shared for head in range(heads)], new.num_attention_heads // kv_heads
    attention = _Part("self_attn.o_proj", readers, head_dim, groups, quota)
    channels = [0] * old.intermediate_size
    return [attention, _Part("mlp.down_proj", ("mlp.gate_proj", "mlp.up_proj"), 1, channels, new.intermediate_size)]


def _narrow_blocks(model: nn.Module, parts: list[_Part], options: Options, context: Context) -> list[dict[str, Any]]:
    """Walk once and narrow each block after its inputs were seen; returns figures per block."""
    found = []
    for visit in walk(model, context.ids, label="pruning width"):
        grams = {part.writer: Gram(visit.block.get_submodule(part.writer).in_features) for part in parts}
        feed_groups(visit.block, visit.inputs, {(writer,): gram.feed for writer, gram in grams.items()})
        found.append({"block": visit.index})
        for part in parts:
            found[-1] |= _narrow(visit.block, part, grams[part.writer].matrix, options)
    return found


def _narrow(block: nn.Module, part: _Part, gram: torch.Tensor, options: Options) -> dict[str, Any]:
    """Choose the structures of a part, cut all its linears in place and refit the writer."""
    writer = block.get_submodule(part.writer)
    weight, mask = writer.weight.detach(), mask_of(writer)
    rounds = ROUNDS if part.width == 1 else None
    stay = choose_structures(
        weight, gram, part.width, part.groups, part.quota, options.damp, options.compensate, rounds
    )
    keep = channels_of(stay, part.width).to(weight.device)
    plain = weight[:, keep]
    refit = options.compensate and len(keep) < writer.in_features
    fitted = compensate(weight, gram, keep, options.damp) if refit else plain
    if mask is not None:  # what an earlier pass pruned stays pruned
        fitted = torch.where(mask[:, keep], fitted, 0)
    for name in part.readers:
        _cut(block.get_submodule(name), block.get_submodule(name).weight[keep], keep)
    _cut(writer, fitted)
    results = {"error": writer.weight, "error_plain": plain}
    errors = {name: output_error(weight, gram, keep, result) for name, result in results.items()}
    if part.width == 1:
        return {"channels": len(keep)} | {f"ffn_{name}": error for name, error in errors.items()}
    attention = block.self_attn
    attention.num_key_value_groups = attention.q_proj.out_features // attention.k_proj.out_features
    return {"heads": stay.tolist()} | {f"attention_{name}": error for name, error in errors.items()}


def _cut(linear: nn.Linear, weight: torch.Tensor, outputs: torch.Tensor | None = None) -> None:
    """Give a linear a smaller weight `[out, in]`, and a bias of the outputs that stay."""
    linear.weight = nn.Parameter(weight.to(linear.weight.dtype).contiguous(), requires_grad=False)
    linear.out_features, linear.in_features = weight.shape
    if linear.bias is not None and outputs is not None:
        linear.bias = nn.Parameter(linear.bias[outputs].contiguous(), requires_grad=False)


def _set_config(model: nn.Module, config: Any) -> None:
    """Put a configuration in the place of the old one, in all modules that hold it."""
    old = model.config
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = config
        if hasattr(module, "intermediate_size"):
            module.intermediate_size = config.intermediate_size


def _suffix(options: Options) -> str:
    """What a format is called at this width: "@0.653", or "@0.7/0.6" for heads and FFN."""
    heads, ffn = options.keep_heads, options.keep_ffn
    if heads == ffn:
        return "" if heads == 1 else f"@{heads:g}"
    return f"@{heads:g}/{ffn:g}"
