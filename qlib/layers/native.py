"""torch operators around our own CPU kernels that multiply with codes."""

import torch

from qlib.layers.build import call, may_use_tiles, missing

__all__ = [
    "missing", "takes", "has_amx", "tiled", "round_rows", "int8_dot", "int8_multiply", "int8_rows", "int4_row",
    "int2_rows", "int2_widen", "int4_expand", "int4_multiply", "round_columns",
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


def _int2_rows(
    x: torch.Tensor, packed: torch.Tensor, scales_zeros: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Product of bf16 `x [rows, in]` and int2 in blocks (int2.py), out a multiple of 64.

    Args:
        packed: uint8 `[out, in / 4]`. scales_zeros: bf16 `[groups, out, 2]`, weight = (code - 2) * scale + zero.
    """
    out, (rows, width) = x.new_empty(len(x), len(packed)), x.shape
    group = width // len(scales_zeros)
    call("int2_rows", x.contiguous(), packed, scales_zeros, bias, out, rows, width, group, len(packed))
    return out


def int2_widen(packed: torch.Tensor) -> torch.Tensor:
    """Codes of 2 bits in blocks, uint8 `[out, in / 4]`, as `int4_row` and `int4_expand` take them, `[out, in / 2]`."""
    wide = packed.new_empty(len(packed), 2 * packed.shape[1])
    call("int2_widen", packed, wide, packed.numel())
    return wide


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
    """Product of bf16 `x [rows, in]` and int4 as for `int4_row`, or int2 as for `int2_rows`, into the first columns of `out`.

    Needs `has_amx`.
    """
    group, bits = x.shape[1] // len(scales_zeros), 8 * packed.shape[1] // x.shape[1]
    call("int4_tiles", x.contiguous(), packed, scales_zeros, out, *x.shape, group, len(packed), out.stride(0), bits)


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
int2_rows = _operator(
    "int2_rows", "Tensor x, Tensor packed, Tensor scales_zeros, Tensor? bias=None", _int2_rows,
    lambda codes, _: len(codes),
)  # fmt: skip
