"""Products with packed codes on a GPU, in Triton, which torch's CUDA build brings along.

Codes of 4 bits lie eight to a word: bits 4 i to 4 i + 3 of word j of a block hold input channel j + i * slice, with slices of
16, 32 or 64 input channels, so that activations are read in their order. Weights are the left factor of every product:
tensor cores take that one from registers, where it has just been made of codes.
"""

import torch
import triton
import triton.language as tl

__all__ = [
    "round_tokens", "multiply_int8", "multiply_int4", "expand_int4", "widen", "pack_int4", "unpack_int4", "slice_of",
]  # fmt: skip

TYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
SLICES = (64, 32, 16)  # input channels; the largest that fits is the fastest
IN_WORD = 8  # codes
#: Adding and taking away 1.5 * 2**23 rounds a float below 2**22 to a whole number, ties to even.
WHOLE = tl.constexpr(12582912.0)
#: The bits of 128 in bf16, and of 16 in fp32: a code of 4 bits put in below makes them 128 + code, and 16 + code.
BITS_OF_128, BITS_OF_16 = tl.constexpr(0x4300), tl.constexpr(0x41800000)
CODE_OF_16 = tl.constexpr(0x780000)
WIDEST = 4096  # elements that one program of `widen` converts
DEEPEST = 256  # input channels of a step, at most


def _tuned(key: str, *settings: tuple[int, ...]):
    """The fastest of some settings is chosen for every shape when it first comes up.

    Args:
        key: arguments that make a shape. settings: output channels of a program, input channels, warps, stages.
    """
    names = ("CHANNELS", "DEPTH")
    configs = [triton.Config(dict(zip(names, s[:2])), num_warps=s[2], num_stages=s[3]) for s in settings]
    return triton.autotune(configs, key=key.split(), do_bench=_time)


def _time(call, quantiles) -> list[float]:
    return triton.testing.do_bench(call, warmup=5, rep=20, quantiles=quantiles)  # milliseconds: there are many shapes


@triton.jit
def _round_tokens(x, codes, scales, width, LARGEST: tl.constexpr, IS_INT: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    values = tl.load(x + row * width + columns, columns < width, 0.0).to(tl.float32)
    scale = tl.div_rn(tl.max(tl.abs(values)), LARGEST)
    scale = tl.where(scale == 0, 1.0, scale)
    steps = tl.div_rn(values, scale)
    if IS_INT:
        steps = (steps + WHOLE) - WHOLE
    tl.store(codes + row * width + columns, steps.to(codes.dtype.element_ty), columns < width)
    tl.store(scales + row, scale)


def round_tokens(x: torch.Tensor, element: str) -> tuple[torch.Tensor, torch.Tensor]:
    """`qlib.layers.base.round_tokens` of `x [rows, in]` in one pass, codes in the type that products take."""
    x = x.contiguous()
    codes, scales = torch.empty_like(x, dtype=TYPES[element]), x.new_empty(len(x), 1, dtype=torch.float32)
    width = triton.next_power_of_2(x.shape[1])
    largest = 127.0 if element == "int8" else 448.0
    warps = max(1, min(16, width // 512))
    _round_tokens[(len(x),)](x, codes, scales, x.shape[1], largest, element == "int8", width, num_warps=warps)
    return codes, scales


@_tuned("out_features in_features ROWS", (32, 256, 4, 3), (32, 256, 2, 4), (64, 256, 4, 4), (128, 64, 4, 4))
@triton.jit(do_not_specialize=["rows"])
def _multiply_int8(
    x, codes, scales, offsets, sums, bias, out, rows, out_features, in_features, WHOLE_STEPS: tl.constexpr,
    HAS_OFFSETS: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    depth = tl.arange(0, DEPTH)
    row_ok, channel_ok = row < rows, channel < out_features
    weights = codes + channel[:, None].to(tl.int64) * in_features + depth[None, :]
    sources = x + row[None, :].to(tl.int64) * in_features + depth[:, None]
    total = tl.zeros((CHANNELS, ROWS), tl.float32)
    for start in range(0, in_features, DEPTH):
        if WHOLE_STEPS:
            weight = tl.load(weights + start, channel_ok[:, None], 0)
            values = tl.load(sources + start, row_ok[None, :], 0.0)
        else:  # a mask along the input channels breaks loads into small ones
            inside = start + depth < in_features
            weight = tl.load(weights + start, channel_ok[:, None] & inside[None, :], 0)
            values = tl.load(sources + start, row_ok[None, :] & inside[:, None], 0.0)
        total = tl.dot(weight.to(tl.bfloat16), values, total)
    total = total * tl.load(scales + channel, channel_ok, 0.0).to(tl.float32)[:, None]
    if HAS_OFFSETS:
        offset = tl.load(offsets + channel, channel_ok, 0.0)
        total += offset[:, None] * tl.load(sums + row, row_ok, 0.0)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + channel, channel_ok, 0.0).to(tl.float32)[:, None]
    place = out + row[None, :].to(tl.int64) * out_features + channel[:, None]
    tl.store(place, total.to(tl.bfloat16), channel_ok[:, None] & row_ok[None, :])


def multiply_int8(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    """bf16 `x [rows, in]` times int8 `codes [out, in]` -> bf16 `[rows, out]`.

    Args:
        scales: bf16 `[out, 1]`. offsets: fp32 `[out, 1]`, times the sum of a row's activations, or None.
        bias: bf16 `[out]`, or None.
    """
    x, (rows, in_features), out_features = x.contiguous(), x.shape, len(codes)
    out, block = x.new_empty(rows, out_features), _rows_at_once(rows)
    sums = None if offsets is None else _sums(x, 1)
    _multiply_int8[lambda meta: (triton.cdiv(out_features, meta["CHANNELS"]), triton.cdiv(rows, block))](
        x, codes, scales, offsets, sums, bias, out, rows, out_features, in_features, in_features % DEEPEST == 0,
        offsets is not None, bias is not None, block,
    )  # fmt: skip
    return out


@triton.jit
def _scale_and_zero(pairs, at, ok):
    """Two bf16 numbers that lie side by side, as fp32."""
    pair = tl.load(pairs + at, ok, 0)
    return (pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True)


@_tuned("out_features in_features GROUP ROWS", (32, 0, 2, 2), (32, 0, 4, 3), (64, 0, 4, 2), (128, 0, 8, 2))
@triton.jit(do_not_specialize=["rows"])
def _multiply_int4(
    x, words, pairs, sums, bias, out, rows, out_features, in_features, HAS_BIAS: tl.constexpr,
    GROUP: tl.constexpr, SLICE: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    depth, groups = tl.arange(0, SLICE), in_features // GROUP
    row_ok, channel_ok = row < rows, channel < out_features
    places = words + channel[:, None].to(tl.int64) * (in_features // 8) + depth[None, :]
    sources = x + row[None, :].to(tl.int64) * in_features + depth[:, None]
    total = tl.zeros((CHANNELS, ROWS), tl.float32)
    for block in range(in_features // (8 * SLICE)):
        word = tl.load(places + block * SLICE, channel_ok[:, None], 0)
        for inner in tl.static_range(8 * SLICE // GROUP):
            part = tl.zeros((CHANNELS, ROWS), tl.float32)
            for step in tl.static_range(GROUP // SLICE):
                index = inner * (GROUP // SLICE) + step
                code = ((word >> (4 * index)) & 15).to(tl.uint16)
                weight = (code | BITS_OF_128).to(tl.bfloat16, bitcast=True)
                values = tl.load(sources + (block * 8 + index) * SLICE, row_ok[None, :], 0.0)
                part = tl.dot(weight, values, part)
            group = block * (8 * SLICE // GROUP) + inner
            scale, zero = _scale_and_zero(pairs, group * out_features + channel, channel_ok)
            added = tl.load(sums + row * groups + group, row_ok, 0.0)
            total += part * scale[:, None] + (zero - 136 * scale)[:, None] * added[None, :]  # 136: 128, and 8 of the zero
    if HAS_BIAS:
        total += tl.load(bias + channel, channel_ok, 0.0).to(tl.float32)[:, None]
    place = out + row[None, :].to(tl.int64) * out_features + channel[:, None]
    tl.store(place, total.to(tl.bfloat16), channel_ok[:, None] & row_ok[None, :])


@_tuned("out_features in_features GROUP", (16, 0, 4, 3), (32, 0, 4, 3), (32, 0, 8, 3), (64, 0, 8, 3))
@triton.jit
def _multiply_int4_row(
    x, words, pairs, sums, bias, out, out_features, in_features, HAS_BIAS: tl.constexpr, GROUP: tl.constexpr,
    SLICE: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    channel, depth = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, SLICE)
    ok = channel < out_features
    places = words + channel[:, None].to(tl.int64) * (in_features // 8) + depth[None, :]
    total = tl.zeros((CHANNELS, SLICE), tl.float32)
    moved = tl.zeros((CHANNELS,), tl.float32)
    for block in range(in_features // (8 * SLICE)):
        word = tl.load(places + block * SLICE, ok[:, None], 0)
        for inner in tl.static_range(8 * SLICE // GROUP):
            part = tl.zeros((CHANNELS, SLICE), tl.float32)
            for step in tl.static_range(GROUP // SLICE):
                index = inner * (GROUP // SLICE) + step
                lifted = word << (19 - 4 * index) if index < 5 else word >> (4 * index - 19)
                weight = (lifted & CODE_OF_16 | BITS_OF_16).to(tl.float32, bitcast=True)
                values = tl.load(x + (block * 8 + index) * SLICE + depth).to(tl.float32)
                part += weight * values[None, :]
            group = block * (8 * SLICE // GROUP) + inner
            scale, zero = _scale_and_zero(pairs, group * out_features + channel, ok)
            total += part * scale[:, None]
            moved += (zero - 24 * scale) * tl.load(sums + group)  # 24: 16, and 8 of the zero
    found = tl.sum(total, 1) + moved
    if HAS_BIAS:
        found += tl.load(bias + channel, ok, 0.0).to(tl.float32)
    tl.store(out + channel, found.to(tl.bfloat16), ok)


def multiply_int4(
    x: torch.Tensor, words: torch.Tensor, scales_zeros: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """bf16 `x [rows, in]` times codes as `pack_int4` orders them -> bf16 `[rows, out]`.

    Args:
        scales_zeros: bf16 `[groups, out, 2]`, weight = (code - 8) * scale + zero.
    """
    x, (rows, in_features), out_features, groups = x.contiguous(), x.shape, len(words), len(scales_zeros)
    out, group, block = x.new_empty(rows, out_features), in_features // groups, _rows_at_once(rows)
    given = (x, words, scales_zeros.view(torch.int32), _sums(x, groups), bias, out)
    form = (bias is not None, group, slice_of(in_features, group))

    def on_tensor_cores() -> None:
        grid = lambda meta: (triton.cdiv(out_features, meta["CHANNELS"]), triton.cdiv(rows, block))  # noqa: E731
        _multiply_int4[grid](*given, rows, out_features, in_features, *form, block)

    def row_by_row() -> None:
        grid = lambda meta: (triton.cdiv(out_features, meta["CHANNELS"]),)  # noqa: E731
        _multiply_int4_row[grid](*given, out_features, in_features, *form)

    if rows == 1:
        key = (out_features, in_features, groups, x.device)
        if key not in _FASTER:
            both = {call: _time(call, (0.5,)) for call in (row_by_row, on_tensor_cores)}
            _FASTER[key] = both[row_by_row] <= both[on_tensor_cores]
        row_by_row() if _FASTER[key] else on_tensor_cores()
    else:
        on_tensor_cores()
    return out


#: For one row of a shape: whether plain arithmetic is faster than tensor cores, of whose 16 rows it would use one.
_FASTER: dict[tuple, bool] = {}


def _rows_at_once(rows: int) -> int:
    """Rows that a program works on: tensor cores take no fewer than 16, and room for activations is limited."""
    return max(16, min(64, triton.next_power_of_2(rows)))


def _sums(x: torch.Tensor, groups: int) -> torch.Tensor:
    """fp32 sums `[rows, groups]` of the activations of each group."""
    return x.view(len(x), groups, -1).sum(-1, dtype=torch.float32)


@triton.jit
def _expand_int4(
    words, scales_zeros, out, first, end, out_features, in_features, GROUP: tl.constexpr, SLICE: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(1)
    here = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    channel, depth = first + here, tl.arange(0, SLICE)
    ok = channel < end
    word = tl.load(words + channel[:, None].to(tl.int64) * (in_features // 8) + block * SLICE + depth[None, :], ok[:, None], 0)
    for index in tl.static_range(8):
        at = ((block * 8 + index) * SLICE // GROUP * out_features + channel) * 2
        scale = tl.load(scales_zeros + at, ok, 0.0).to(tl.float32)
        zero = tl.load(scales_zeros + at + 1, ok, 0.0).to(tl.float32)
        code = ((word >> (4 * index)) & 15).to(tl.float32)
        weight = (code - 8) * scale[:, None] + zero[:, None]
        place = out + here[:, None].to(tl.int64) * in_features + (block * 8 + index) * SLICE + depth[None, :]
        tl.store(place, weight.to(tl.bfloat16), ok[:, None])


def expand_int4(words: torch.Tensor, scales_zeros: torch.Tensor, first: int, out: torch.Tensor) -> None:
    """Write the weights of the output channels from `first` on into bf16 `out [channels, in]`."""
    (channels, in_features), group = out.shape, out.shape[1] // len(scales_zeros)
    wide = slice_of(in_features, group)
    _expand_int4[(triton.cdiv(channels, 32), in_features // (IN_WORD * wide))](
        words, scales_zeros, out, first, first + channels, len(words), in_features, group, wide, 32
    )


@triton.jit
def _widen(codes, out, count, COUNT: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * COUNT + tl.arange(0, COUNT)
    tl.store(out + at, tl.load(codes + at, at < count, 0).to(tl.bfloat16), at < count)


def widen(codes: torch.Tensor, out: torch.Tensor) -> None:
    """Write int8 `codes` as bf16 numbers into `out`, both contiguous."""
    _widen[(triton.cdiv(codes.numel(), WIDEST),)](codes, out, codes.numel(), WIDEST)


def slice_of(in_features: int, group: int) -> int | None:
    """Input channels of a slice; None: these groups do not fill whole words."""
    return next((one for one in SLICES if in_features % (IN_WORD * one) == 0 and group % one == 0), None)


def pack_int4(codes: torch.Tensor, group: int) -> torch.Tensor:
    """uint8 codes below 16 `[out, in]` in groups of `group` to int32 words `[out, in / 8]`."""
    parts = codes.view(len(codes), -1, IN_WORD, slice_of(codes.shape[1], group)).unbind(2)  # each [out, blocks, slice]
    words = torch.zeros_like(parts[0], dtype=torch.int32)
    for index, part in enumerate(parts):
        words |= part.int() << 4 * index
    return words.flatten(1)


def unpack_int4(words: torch.Tensor, group: int) -> torch.Tensor:
    """The inverse of `pack_int4`."""
    blocks = words.view(len(words), -1, slice_of(IN_WORD * words.shape[1], group))
    return torch.stack([(blocks >> 4 * index & 15).to(torch.uint8) for index in range(IN_WORD)], dim=2).flatten(1)
