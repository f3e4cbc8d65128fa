"""What Qwen's authors publish about their 72B models, beside the least that the hardware allows.

The figures below are published ones, with their sources; sizes and floors are computed from the shape of the model.
"""

from dataclasses import dataclass

from qlib.evaluate.footprint import shape_footprint
from qlib.evaluate.parts import head_bytes, layer_bytes
from qlib.models.shapes import find_shape
from qlib.report.html import Cell, Column, Table
from qlib.report.show import table

__all__ = ["PublishedModel", "PUBLISHED", "A100_BANDWIDTH", "least_token_ms", "published_table", "quality_table"]

#: Gigabytes per second that one A100 SXM 80GB reads at best: NVIDIA's data sheet of the A100.
A100_BANDWIDTH = 2039
QWEN = "github.com/QwenLM/Qwen, README, sections Performance, Quantization and Inference Performance"
QWEN25 = "github.com/QwenLM/Qwen3, commit a912d23, docs/source/benchmark/speed_benchmark.rst"
A100 = "A100-SXM4-80G, 2048 new tokens, batch 1, PyTorch 2.0.1, Flash-Attention 2"
A100_25 = "A100 80GB, 2048 new tokens after 1, batch 1, transformers 4.46, AutoGPTQ 0.7.1"


@dataclass(frozen=True)
class PublishedModel:
    """One model in one precision.

    Attributes:
        shape: its name in `qlib.models.shapes`. format: the number format here that is closest.
        gigabytes: of GPU memory. tokens: per second, of one request. gpus: of how many they are the figures.
        quality: percent by benchmark; empty: not published for this precision.
    """

    model: str
    precision: str
    shape: str
    format: str
    gigabytes: float
    tokens: float
    gpus: int
    setting: str
    source: str
    quality: tuple[tuple[str, float], ...] = ()


def _chat(precision: str, format: str, gigabytes: float, tokens: float, gpus: int, *percent: float) -> PublishedModel:
    quality = tuple(zip(("MMLU", "C-Eval (val)", "GSM8K", "HumanEval"), percent))
    return PublishedModel("Qwen-72B-Chat", precision, "qwen-72b", format, gigabytes, tokens, gpus, A100, QWEN, quality)


def _instruct(precision: str, format: str, gigabytes: float, tokens: float, gpus: int) -> PublishedModel:
    names = ("Qwen2.5-72B-Instruct", precision, "qwen2.5-72b", format)
    return PublishedModel(*names, gigabytes, tokens, gpus, A100_25, QWEN25)


PUBLISHED = (
    _chat("BF16", "bf16", 144.69, 8.48, 2, 74.4, 80.1, 76.4, 64.6),
    _chat("GPTQ Int8", "int8-g128", 81.27, 9.05, 2, 73.5, 80.1, 73.5, 62.2),
    _chat("GPTQ Int4", "int4-g128", 48.86, 11.32, 1, 73.4, 80.1, 75.3, 61.6),
    _instruct("BF16", "bf16", 136.20, 8.73, 2),
    _instruct("GPTQ Int8", "int8-g128", 72.61, 8.66, 2),
    _instruct("GPTQ Int4", "int4-g128", 39.91, 11.07, 1),
    _instruct("AWQ", "int4-g128", 39.44, 11.50, 1),
)


def least_token_ms(shape: str, format: str, gigabytes_per_second: float) -> float:
    """The roofline: milliseconds in which the weights that a token needs are read once, whatever computes.

    With several GPUs that hold some layers each, a token passes through them in turn, so that the sum is the same. The
    embedding is looked up, not read; the cache is left out.
    """
    one = find_shape(shape)
    return (one.layers * layer_bytes(one, format) + head_bytes(one)) / gigabytes_per_second / 1e6


def published_table(bandwidth: float = A100_BANDWIDTH) -> Table:
    """Memory and speed as published, the size of the weights, and the floor that the bandwidth sets."""
    rows = []
    for one in PUBLISHED:
        weights = shape_footprint(find_shape(one.shape), one.format)["size.resident_bytes"]
        floor = least_token_ms(one.shape, one.format, bandwidth)
        share = {"value": one.tokens * floor / 1e3, "unit": "fraction"}
        cells = [Cell(one.model), one.precision, str(one.gpus), one.gigabytes, weights, one.tokens, 1e3 / floor, share]
        rows.append([*cells, Cell(one.setting, (one.source,), kind="how")])
    caption = (
        "What Qwen's authors publish, and what the hardware allows at best. Weights: by arithmetic, without the cache. "
        "Memory is printed as GB; bf16's weights and the cache of 2,048 tokens would not fit, so it is probably GiB. At "
        f"best: the weights read once for every token at {bandwidth:,} GB/s, the bandwidth of one A100; the layers lie "
        "behind one another, so that a second GPU holds more but makes a token no faster."
    )
    columns = [
        Column("Model"), Column("Precision"), Column("GPUs"), Column("Memory", "GB, published"), Column("Weights"),
        Column("Speed", "tokens/s, published"), Column("At best", "tokens/s"), Column("Share of the roofline"),
        Column("Setting and source"),
    ]  # fmt: skip
    return table(columns, rows, caption, "published-qwen")


def quality_table() -> Table:
    """What the same precisions cost in answers, as published."""
    told = [one for one in PUBLISHED if one.quality]
    names = [name for name, _ in told[0].quality]
    rows = [[f"{one.model}, {one.precision}", *(value for _, value in one.quality)] for one in told]
    caption = f"Right answers as Qwen's authors report them, without intervals. Source: {QWEN}."
    return table([Column("Model"), *(Column(name, "%") for name in names)], rows, caption, "published-quality")
