"""Move a factor per channel from what produces a channel to the linears that read it: the block computes the same."""

import torch
from torch import nn

__all__ = ["PRODUCERS", "by_channel", "by_input", "rescale"]

#: What produces the inputs of each group of linears, by the group's first: a norm's weight, or the rows of a linear
#: that stands before something linear (attention averages values; gate times up is linear in up).
PRODUCERS = {
    "self_attn.q_proj": "input_layernorm",
    "self_attn.o_proj": "self_attn.v_proj",
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.down_proj": "mlp.up_proj",
}


def by_channel(block: nn.Module, names: tuple[str, ...], values: torch.Tensor) -> torch.Tensor:
    """Sort what belongs to the inputs of `names` `[in]` by the channel that produces them: `[channels, copies]`.

    Query heads that share a value head read copies of its channels; everything else is read once.
    """
    copies, width = _copies(block, names)
    return values.view(-1, copies, width).transpose(1, 2).reshape(-1, copies)


def by_input(block: nn.Module, names: tuple[str, ...], values: torch.Tensor) -> torch.Tensor:
    """Give every input of `names` the value of its channel: `[channels]` to `[in]`."""
    copies, width = _copies(block, names)
    return values.view(-1, 1, width).expand(-1, copies, -1).flatten()


@torch.no_grad()
def rescale(block: nn.Module, names: tuple[str, ...], scale: torch.Tensor) -> torch.Tensor:
    """Multiply the weights of `names` by `scale` `[channels]`, divide what produces their inputs by it; in place.

    A norm's weight is divided first, and what it was divided by once it is rounded to its type is the scale the others
    get: storing the norm in bf16 then costs nothing. Zeros stay zeros, so masks survive.

    Returns:
        the scale of each input `[in]`.
    """
    producer = block.get_submodule(PRODUCERS[names[0]])
    if producer.weight.dim() == 1:
        before = producer.weight.float().clone()  # fp32 weights would be the same tensor
        producer.weight.copy_(before / scale)
        scale = torch.where(producer.weight == 0, scale, before / producer.weight.float())
    else:
        producer.weight.copy_(producer.weight.float() / scale[:, None])
        if producer.bias is not None:
            producer.bias.copy_(producer.bias.float() / scale)
    spread = by_input(block, names, scale)
    for name in names:
        weight = block.get_submodule(name).weight
        weight.copy_(weight.float() * spread)
    return spread


def _copies(block: nn.Module, names: tuple[str, ...]) -> tuple[int, int]:
    """How many inputs read a channel, and how many channels lie together before the copies."""
    inputs = block.get_submodule(names[0]).in_features
    copies = inputs // len(block.get_submodule(PRODUCERS[names[0]]).weight)
    return copies, block.self_attn.head_dim if copies > 1 else 1
