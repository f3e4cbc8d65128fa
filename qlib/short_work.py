"""Norms and gated units of blocks that are learned on a CPU: one kernel each, forwards and backwards, for a dozen operators.

Learning a rounding runs a block some hundred times, and half of that goes into short operators around the products.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from qlib.layers import native

__all__ = ["ShortWork"]

FAMILIES = ("Qwen2", "Qwen3", "Llama", "Mistral")
LANES = 16  # numbers that the kernels take at a time


@contextmanager
def ShortWork(block: nn.Module) -> Iterator[None]:
    """While this is active, norms and gated units inside `block` run kernels of our own where these can.

    They compute what transformers computes, rounded to bf16 where it rounds; norms pass no gradient to their weights.
    """
    patched = []
    for module in block.modules():
        name = type(module).__name__
        if name in [f"{family}RMSNorm" for family in FAMILIES]:
            module.forward = partial(_normed, module)
        elif name in [f"{family}MLP" for family in FAMILIES] and "silu" in type(module.act_fn).__name__.lower():
            module.forward = partial(_gated, module)
        else:
            continue
        patched.append(module)
    try:
        yield
    finally:
        for module in patched:
            del module.forward


def _takes(x: torch.Tensor) -> bool:
    return x.dtype == torch.bfloat16 and native.takes(x.device, x.shape[-1], LANES)


def _normed(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if not _takes(x) or norm.weight.requires_grad or norm.weight.dtype != x.dtype:
        return type(norm).forward(norm, x)
    return _Norm.apply(x, norm.weight, norm.variance_epsilon)


def _gated(mlp: nn.Module, x: torch.Tensor) -> torch.Tensor:
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    taken = _takes(gate) and up.dtype == gate.dtype
    return mlp.down_proj(_Gated.apply(gate, up) if taken else mlp.act_fn(gate) * up)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(rows, weight)
        ctx.epsilon = epsilon
        return native.rms_norm(rows, weight, epsilon).view(x.shape)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        given = gradient.reshape(rows.shape)
        return native.rms_norm_backward(rows, weight, given, ctx.epsilon).view(gradient.shape), None, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return native.gated(gate, up)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return native.gated_backward(*ctx.saved_tensors, gradient.contiguous())
