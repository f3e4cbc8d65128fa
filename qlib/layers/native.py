"""torch operators around our own CPU kernels."""

import torch

from qlib.layers.build import call, may_use_tiles, missing

__all__ = [
    "missing", "takes", "has_amx", "tiled", "round_rows", "int8_dot", "int8_multiply", "int8_rows", "int4_row",
    "int4_expand", "int4_multiply", "rms_norm", "attend", "causal_softmax", "causal_softmax_backward", "attend_windows",
    "attend_windows_backward", "round_columns",
]  # fmt: skip

#: Rows from which tile registers are worth filling, and the channels that they take at a time.
TILED_ROWS, TILED_CHANNELS = 8, 32


def takes(device: torch.device, channels: int, multiple: int) -> bool:
    """Whether kernels that want `channels` in multiples of `multiple` run on `device`."""
    return device.type == "cpu" and channels % multiple == 0 and not missing()


def has_amx() -> bool:
    """Whether products of many rows run on the tile registers of this processor."""
    return not missing() and may_use_tiles()


def tiled(rows: int, channels: int) -> bool:
    """Whether products with int8 codes of this size run on tile registers."""
    return rows >= TILED_ROWS and channels % TILED_CHANNELS == 0 and has_amx()


def round_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round every row of bf16 `x [rows, in]` to whole numbers of its largest magnitude / 127.

    Returns:
        codes int8 `[rows, in]`, scales fp32 `[rows]`, sums of the codes int32 `[rows]`.
    """
    x = x.contiguous()
    codes, scales = torch.empty_like(x, dtype=torch.int8), x.new_empty(len(x), dtype=torch.float32)
    sums = x.new_empty(len(x), dtype=torch.int32)
    call("quantize_rows", x, codes, scales, sums, *x.shape)
    return codes, scales, sums


def _int8_dot(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Product of bf16 `x [rows, in]`, rounded to 8 bits row by row, and int8 codes, in tiles (int8_tiles.py)."""
    out, (rounded, row_scales, sums) = x.new_empty(x.shape[0], len(scales)), round_rows(x)
    if tiled(len(x), len(scales)):
        call("int8_tiles", rounded, row_scales, codes, scales, bias, out, *x.shape, len(scales))
    else:
        call("int8_dot", rounded, row_scales, sums, codes, scales, bias, out, *x.shape, len(scales))
    return out


def _int8_rows(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Product of bf16 `x [rows, in]` and weights codes * scales + offsets.

    Args:
        codes: int8, in tiles (int8_tiles.py). scales: bf16, offsets: fp32 `[out, groups]`. A group is a multiple of 32.
    """
    out, (channels, groups) = x.new_empty(x.shape[0], len(scales)), scales.shape
    call("int8_rows", x.contiguous(), codes, scales, offsets, bias, out, *x.shape, x.shape[1] // groups, channels)
    return out


def int8_multiply(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    """As `_int8_rows` for many rows and one group, sums in fp32; needs `tiled`."""
    out = x.new_empty(len(x), len(scales))
    call("int8_wide_tiles", x.contiguous(), codes, scales, offsets, bias, out, *x.shape, len(scales))
    return out


def _int4_row(
    x: torch.Tensor, packed: torch.Tensor, scales_zeros: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Product of bf16 `x [1, in]` and int4 in the order of torch's kernel (int4_blocks), out a multiple of 64.

    Args:
        packed: uint8 `[out, in / 2]`. scales_zeros: bf16 `[groups, out, 2]`, weight = (code - 8) * scale + zero.
    """
    channels, width = packed.shape[0], x.shape[1]
    out = x.new_empty(1, channels)
    group = width // scales_zeros.shape[0]
    call("int4_row", x.contiguous(), packed, scales_zeros, bias, out, width, group, channels)
    return out


def int4_expand(
    packed: torch.Tensor, scales_zeros: torch.Tensor, first: int, channels: int, out: int, wide: int
) -> None:
    """Write the bf16 weights of `channels` output channels from `first` on, multiples of 64, to the address `out`.

    They are written in the order of oneDNN's own kernels, `[channels / wide, in / 2, wide, 2]`, `wide` 32 or 64.
    """
    in_features = 2 * packed.shape[1]
    group = in_features // len(scales_zeros)
    part = (first, channels // 64, 0, in_features)
    call("int4_expand", packed, scales_zeros, out, in_features, group, len(packed), *part, wide)


def int4_multiply(x: torch.Tensor, packed: torch.Tensor, scales_zeros: torch.Tensor, out: torch.Tensor) -> None:
    """Product of bf16 `x [rows, in]` and int4 as for `int4_row`, into the first columns of `out`; needs `has_amx`."""
    group = x.shape[1] // len(scales_zeros)
    call("int4_tiles", x.contiguous(), packed, scales_zeros, out, *x.shape, group, len(packed), out.stride(0))


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


def round_columns(
    moved: torch.Tensor,
    errors: torch.Tensor,
    upper: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    groups: torch.Tensor,
    kept: torch.Tensor | None,
    levels: int,
) -> None:
    """The inner loop of `qlib.quantize.gptq.solve_columns` for integers, in place.

    Args:
        moved: fp32 `[columns, out]`, what the columns before these ask for; becomes the codes. errors: fp32
            `[columns, out]`, weights, become what is left of them. upper: fp32 `[columns, columns]`.
        scales, zeros: fp32 `[all groups, out]`. groups: int64 `[columns]`. kept: bool `[columns, out]`, or None.
    """
    upper = upper.contiguous()
    call("round_columns", moved, errors, upper, scales, zeros, groups, kept, *moved.shape, levels)


def _operator(name: str, schema: str, function, channels) -> torch._ops.OpOverload:
    """Make a function an operator, so that torch.compile can call it: cheaper at each call than `custom_op`.

    `channels`: how many the result has, from codes and scales.
    """
    LIBRARY.define(f"{name}({schema}) -> Tensor")
    LIBRARY.impl(name, function, "CPU")
    torch.library.register_fake(
        f"qlib::{name}", lambda x, codes, scales, *_: x.new_empty(x.shape[0], channels(codes, scales)), lib=LIBRARY
    )
    return getattr(torch.ops.qlib, name).default


LIBRARY = torch.library.Library("qlib", "DEF")
int8_dot = _operator(
    "int8_dot", "Tensor x, Tensor codes, Tensor scales, Tensor? bias=None", _int8_dot, lambda _, scales: len(scales)
)
int8_rows = _operator(
    "int8_rows", "Tensor x, Tensor codes, Tensor scales, Tensor? offsets=None, Tensor? bias=None", _int8_rows,
    lambda _, scales: len(scales),
)  # fmt: skip
int4_row = _operator(
    "int4_row", "Tensor x, Tensor packed, Tensor scales_zeros, Tensor? bias=None", _int4_row,
    lambda codes, _: len(codes),
)  # fmt: skip
