"""The architectures qlib compresses, described as data."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qlib.errors import UserError, nearest

__all__ = ["Family", "FAMILIES", "CONVERTED", "family_of", "blocks_of", "linears_of"]


@dataclass(frozen=True)
class Family:
    """Where the parts of a decoder-only model lie.

    Attributes:
        groups: linears of a block, in the order they run; those in one group read the same input.
    """

    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens"
    norm: str = "model.norm"
    head: str = "lm_head"
    groups: tuple[tuple[str, ...], ...] = (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    )


#: By `model_type` of config.json.
FAMILIES = {"qwen2": Family(), "qwen3": Family(), "llama": Family(), "mistral": Family()}
#: Others that become one of these when they are loaded.
CONVERTED = {"qwen": "qwen2"}


def family_of(config: Any, where: str = "config.json") -> Family:
    """The family of a model configuration.

    Raises:
        UserError: the architecture is not supported.
    """
    kind = getattr(config, "model_type", None)
    if kind not in FAMILIES:
        allowed = ", ".join([*FAMILIES, *CONVERTED])
        raise UserError(f"{where}: model_type: '{kind}' is not supported{nearest(kind, FAMILIES)}; allowed: {allowed}")
    return FAMILIES[kind]


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks of a model, in order."""
    return model.get_submodule(family_of(model.config).blocks)


def linears_of(model: nn.Module, block: nn.Module) -> dict[str, nn.Module]:
    """The compressible linears of a block by their name inside it (packed or not)."""
    return {name: block.get_submodule(name) for group in family_of(model.config).groups for name in group}


def weight_parameters(model: nn.Module) -> int:
    """Number of weights in compressible linears: what "bits per weight" is an average over."""
    linears = (linear for block in blocks_of(model) for linear in linears_of(model, block).values())
    return sum(linear.in_features * linear.out_features for linear in linears)


def is_tied(model: nn.Module) -> bool:
    """True if head and embedding are one tensor, be it weights or codes."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    pairs = [(getattr(head, name, None), getattr(embedding, name, None)) for name in ("weight", "codes")]
    return any(isinstance(ours, torch.Tensor) and ours is theirs for ours, theirs in pairs)
