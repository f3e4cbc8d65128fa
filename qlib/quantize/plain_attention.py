"""Attention for training on a CPU: matrix products of a few queries at a time, several times faster than torch's.

torch's fused attention never holds the weights of attention, which matters where sequences are long, and computes them
again to differentiate, which is slow on a CPU. Windows of calibration text are short, so here they are kept (in the
type of the queries), and queries are cut into pieces that skip the keys they cannot see.
"""

from typing import Any, Callable

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["PlainAttention", "causal_attention"]

PIECE = 64  # queries at a time


class PlainAttention(TorchFunctionMode):
    """While this is active, plain causal attention on a CPU runs `causal_attention`, whatever model asks for it."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and len(args) == 3:
            told = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None} | kwargs
            query, key, value = args
            plain = told["attn_mask"] is None and not told["dropout_p"] and told["is_causal"]
            if plain and query.device.type == "cpu" and query.shape[-2] == key.shape[-2]:
                scale = query.shape[-1] ** -0.5 if told["scale"] is None else told["scale"]
                return causal_attention(query, key, value, scale)
        return func(*args, **kwargs)


def causal_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """softmax(scale Q K^T, each query over the keys up to its own place) V.

    Args:
        query: `[rows, heads, tokens, width]`. key, value: `[rows, key heads, tokens, width]`; where there are fewer key
            heads, neighbouring query heads share one.

    Returns:
        `[rows, heads, tokens, width]`.
    """
    return _Causal.apply(query, key, value, scale)


class _Causal(torch.autograd.Function):
    """Letters as in Dao et al. 2022 (arXiv:2205.14135), appendix B: P = softmax(S), dS = P (dP - rowsum(P dP))."""

    @staticmethod
    def forward(ctx, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        tokens, width = query.shape[-2:]
        pairs = key.shape[0] * key.shape[1]  # rows and key heads, done side by side
        q = (query * scale).reshape(pairs, -1, tokens, width)  # [pairs, queries that share keys, tokens, width]
        k, v = key.reshape(pairs, tokens, width), value.reshape(pairs, tokens, width)
        out, kept = torch.empty_like(q), []
        for part in _parts(tokens):
            size, end = part.stop - part.start, part.stop
            s = torch.bmm(q[:, :, part].reshape(pairs, -1, width), k[:, :end].transpose(1, 2))
            unseen = torch.ones(size, size, dtype=torch.bool).triu_(1)  # earlier keys are seen by all of these queries
            s.view(pairs, -1, size, end)[..., part.start :].masked_fill_(unseen, -torch.inf)
            p = s.softmax(-1)
            out[:, :, part] = torch.bmm(p, v[:, :end]).view(pairs, -1, size, width)
            kept.append(p)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.scale = scale
        return out.view(query.shape)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        pairs, _, tokens, width = q.shape
        do = gradient.reshape(q.shape)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for part, p in zip(_parts(tokens), kept):
            seen, size = slice(0, part.stop), part.stop - part.start
            given = do[:, :, part].reshape(pairs, -1, width)
            dv[:, seen].baddbmm_(p.transpose(1, 2), given)
            dp = torch.bmm(given, v[:, seen].transpose(1, 2))
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            dq[:, :, part] = torch.bmm(ds, k[:, seen]).view(pairs, -1, size, width)
            dk[:, seen].baddbmm_(ds.transpose(1, 2), q[:, :, part].reshape(pairs, -1, width))
        shape = (len(gradient), -1, tokens, width)
        return (dq * ctx.scale).view(gradient.shape), dk.view(shape), dv.view(shape), None


def _parts(tokens: int) -> list[slice]:
    return [slice(start, min(start + PIECE, tokens)) for start in range(0, tokens, PIECE)]
