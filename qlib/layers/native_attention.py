"""Our own CPU kernels of attention and norms."""

import torch

from qlib.layers.build import call

__all__ = [
    "rms_norm", "attend", "causal_softmax", "causal_softmax_backward", "attend_windows", "attend_windows_backward"
]  # fmt: skip


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """bf16 `x [rows, width]`, each row divided by its root mean square, times `weight [width]`.

    The width is a multiple of 16.
    """
    out = torch.empty_like(x)
    call("rms_norm", x, weight, out, epsilon, *x.shape)
    return out


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor],
    keys: torch.Tensor, values: torch.Tensor, used: int,
) -> torch.Tensor:  # fmt: skip
    """Attention of one token: turns q and k, puts k and v into the cache behind its `used` tokens, mixes all values.

    Args:
        q: bf16 `[1, heads * dim]`, dim a multiple of 16. k, v: `[1, kv_heads * dim]`.
        rotary: cosines and sines of the position, `dim` of each, the first half of the sines negative.
        keys, values: the cache, bf16 `[kv_heads, capacity, dim]`; written to.
    """
    out, (kv_heads, capacity, dim) = torch.empty_like(q), keys.shape
    call("attend", q, k, v, *rotary, keys, values, out, q.shape[1] // dim, kv_heads, dim, capacity, used)
    return out


def causal_softmax(scores: torch.Tensor, first: int, piece: int) -> None:
    """Softmax over the last axis of bf16 `scores [..., keys]`, in place, infinities left out.

    Row r of the last but one axis sees the first `first + r % piece + 1` keys, all others get weight 0.
    """
    call("causal_softmax", scores, scores.numel() // scores.shape[-1], scores.shape[-1], first, piece)


def causal_softmax_backward(weights: torch.Tensor, gradients: torch.Tensor, first: int, piece: int) -> None:
    """Turn the gradients of what `causal_softmax` made into those of its scores, in place; both bf16 `[..., keys]`."""
    keys = weights.shape[-1]
    call("causal_softmax_backward", weights, gradients, weights.numel() // keys, keys, first, piece)


def attend_windows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of whole windows: softmax(scale Q K^T) V.

    Args:
        q: bf16 `[rows, heads, tokens, width]`. k, v: `[rows, kv_heads, tokens, width]`; neighbouring heads share them.
            The width is a multiple of 32; the numbers of a head lie side by side.

    Returns:
        bf16 `[rows, heads, tokens, width]`, in memory heads next to each other; and the logarithms of what the weights
        were divided by, fp32 `[rows, heads, tokens]`.
    """
    rows, heads, tokens, width = q.shape
    out, logs = _heads_inside(q), q.new_empty(rows, heads, tokens, dtype=torch.float32)
    at = _strides(q, k, v, out)
    call("attend_windows", q, k, v, out, logs, at, scale, rows, heads, k.shape[1], tokens, width)
    return out, logs


def attend_windows_backward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, logs: torch.Tensor, gradient: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the gradient of `attend_windows`' result hands on to q, k and v."""
    rows, heads, tokens, width = q.shape
    gradient = gradient if gradient.stride(-1) == 1 else gradient.contiguous()
    found = tuple(map(_heads_inside, (q, k, v)))
    at = _strides(q, k, v, gradient, *found)
    call("attend_windows_backward", q, k, v, logs, gradient, *found, at, scale, rows, heads, k.shape[1], tokens, width)
    return found


def _heads_inside(like: torch.Tensor) -> torch.Tensor:
    """Room for `[rows, heads, tokens, width]`, in memory `[rows, tokens, heads, width]`, as linears like it."""
    rows, heads, tokens, width = like.shape
    return like.new_empty(rows, tokens, heads, width).transpose(1, 2)


def _strides(*tensors: torch.Tensor) -> torch.Tensor:
    return torch.tensor([tensor.stride()[:3] for tensor in tensors])
