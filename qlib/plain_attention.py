"""Attention for calibration text on a CPU: matrix products of a few queries at a time, several times faster than torch's.

torch's fused attention never holds the weights of attention, which matters where sequences are long, and computes them
again to differentiate, which is slow on a CPU. Windows of calibration text are short, so here they are kept (in the
type of the queries) where they are differentiated. Queries are cut into pieces that skip the keys they cannot see.
"""

from typing import Any, Callable

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from qlib.layers import native, native_attention

__all__ = ["PlainAttention", "causal_attention"]

PIECE = 128  # queries at a time
WIDTHS = 32  # our kernels take heads of a multiple


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
    tensors = (query, key, value)
    if native.takes(query.device, query.shape[-1], WIDTHS) and all(one.dtype == torch.bfloat16 for one in tensors):
        if not native.has_amx():  # there, oneDNN's products run on tile registers, and those of our kernels do not
            return _Windows.apply(*(one if one.stride(-1) == 1 else one.contiguous() for one in tensors), scale)
    return _Causal.apply(query, key, value, scale)


class _Windows(torch.autograd.Function):
    """Kernels of our own for heads of 32, 64, 96, ... numbers; where they are differentiated, weights are computed anew."""

    @staticmethod
    def forward(ctx, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        out, logs = native_attention.attend_windows(query, key, value, scale)
        ctx.save_for_backward(query, key, value, logs)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *native_attention.attend_windows_backward(*ctx.saved_tensors, gradient, ctx.scale), None


class _Causal(torch.autograd.Function):
    """Letters as in Dao et al. 2022 (arXiv:2205.14135), appendix B: P = softmax(S), dS = P (dP - rowsum(P dP))."""

    @staticmethod
    def forward(ctx, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        tokens, width = query.shape[-2:]
        shape = (len(query), key.shape[1], -1, tokens, width)  # [rows, key heads, queries that share keys, ...]
        q = _cut(query.unflatten(1, shape[1:3]), scale)
        k, v = key.reshape(-1, tokens, width), value.reshape(-1, tokens, width)
        out, kept = torch.empty_like(q), []
        for piece, (start, end) in enumerate(_keys(tokens)):
            p = _weights(torch.bmm(q[piece], k[:, :end].transpose(1, 2)), start)  # [pairs, queries of the piece, keys]
            torch.bmm(p, v[:, :end], out=out[piece])
            if any(ctx.needs_input_grad):
                kept.append(p)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.scale, ctx.shape = scale, shape
        return _join(out, shape)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        rows, key_heads, _, tokens, width = ctx.shape
        do = _cut(gradient.unflatten(1, ctx.shape[1:3]))
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for piece, (p, (start, end)) in enumerate(zip(kept, _keys(tokens))):
            dv[:, :end].baddbmm_(p.transpose(1, 2), do[piece])
            dp = torch.bmm(do[piece], v[:, :end].transpose(1, 2))
            ds = _scores_gradient(dp, p, start)
            torch.bmm(ds, k[:, :end], out=dq[piece])
            dk[:, :end].baddbmm_(ds.transpose(1, 2), q[piece])
        shape = (rows, key_heads, tokens, width)
        return _join(dq, ctx.shape, ctx.scale), dk.view(shape), dv.view(shape), None


def _weights(scores: torch.Tensor, start: int) -> torch.Tensor:
    """Softmax of `scores [pairs, sharing * PIECE, keys]`, of which the queries see the first `start` keys and their own."""
    if scores.dtype == torch.bfloat16 and not native.missing():
        native_attention.causal_softmax(scores, start, PIECE)
        return scores
    unseen = torch.ones(PIECE, scores.shape[-1] - start, dtype=torch.bool).triu_(1)
    scores.view(len(scores), -1, PIECE, scores.shape[-1])[..., start:].masked_fill_(unseen, -torch.inf)
    return scores.softmax(-1)


def _scores_gradient(dp: torch.Tensor, p: torch.Tensor, start: int) -> torch.Tensor:
    """Gradient of the scores that became the weights `p` of `_weights`, from that of the weights, which may be overwritten."""
    if p.dtype == torch.bfloat16 and not native.missing():
        native_attention.causal_softmax_backward(p, dp, start, PIECE)
        return dp
    return torch._softmax_backward_data(dp, p, -1, p.dtype)


def _keys(tokens: int) -> list[tuple[int, int]]:
    """For each piece of queries: its first key, and the end of the keys it sees."""
    return [(start, min(start + PIECE, tokens)) for start in range(0, tokens, PIECE)]


def _cut(x: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    """`x [rows, key heads, sharing, tokens, width]` times a factor, in pieces `[pieces, pairs, sharing * PIECE, width]`.

    A pair is a row and a key head. Queries that the last piece lacks are 0.
    """
    if x.shape[3] % PIECE:
        x = F.pad(x, (0, 0, 0, -x.shape[3] % PIECE))
    x = x.unflatten(3, (-1, PIECE)).permute(3, 0, 1, 2, 4, 5)
    out = x.new_empty(x.shape)
    torch.mul(x, factor, out=out)
    return out.view(len(x), -1, x.shape[3] * PIECE, x.shape[5])


def _join(pieces: torch.Tensor, shape: tuple[int, ...], factor: float = 1.0) -> torch.Tensor:
    """The inverse of `_cut`, `[rows, heads, tokens, width]`; in memory heads lie next to each other, as linears like it."""
    rows, key_heads, _, tokens, width = shape
    x = pieces.view(len(pieces), rows, key_heads, -1, PIECE, width).permute(1, 0, 4, 2, 3, 5)
    out = x.new_empty(x.shape)
    torch.mul(x, factor, out=out)
    return out.view(rows, len(pieces) * PIECE, -1, width)[:, :tokens].transpose(1, 2)
