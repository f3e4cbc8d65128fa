"""The parts of a model that are timed, at true shapes with random weights: one decoder layer, and the head."""

import copy
import time

import torch
from torch import nn

from qlib.evaluate.fastest import PlainLinear
from qlib.evaluate.footprint import BF16, Format, grid_of, linear_formats, narrowed_shape, some_format
from qlib.layers import PackedLinear, pack, resident_bytes
from qlib.layers.decode import Cache, rotary_tables, run_block
from qlib.layers.embedding import PackedEmbedding, tied_head
from qlib.models.shapes import Shape, layer_config
from qlib.quantize.grid import CompressedWeight, Grid, fit_grid, round_to_grid

__all__ = [
    "Workload", "random_tensor", "build_layer", "build_head", "build_model", "add_copies", "layer_bytes", "head_bytes",
    "kernels", "distinct_linears",
]  # fmt: skip

#: Random numbers that are really drawn; larger tensors repeat them, since no timing depends on values.
DRAWN = 2**20
#: Weights that are rounded to a grid at a time: few enough to stay in the cache.
SLICE = 2**20
#: Weights of the head that are held, and re-ordered, as one.
HEAD_SLICE = 2**27


class Workload:
    """Tokens and keys and values that a layer works on: `tokens` new ones that follow on `context` cached ones."""

    def __init__(
        self, shape: Shape, tokens: int, context: int, device: torch.device, generator: torch.Generator
    ) -> None:
        from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

        self.x = random_tensor((tokens, shape.hidden), device, generator, scale=1.0)
        self.context, self.cache = context, Cache(shape.kv_heads, context + tokens, shape.head_dim, self.x)
        self.keys, self.values = self.cache.keys[None], self.cache.values[None]  # [1, kv_heads, tokens, head_dim]
        for store in (self.keys, self.values):
            store.copy_(random_tensor(store.shape, device, generator, scale=1.0))
        tables = rotary_tables(Qwen2RotaryEmbedding(config=layer_config(shape)).to(device), context + tokens, self.x)
        self.rotary = tuple(table[context:] for table in tables)

    def run(self, layer: nn.Module) -> torch.Tensor:
        return run_block(layer, self.x, self.rotary, self.cache, self.context)


def random_tensor(
    size: tuple[int, ...], device: torch.device, generator: torch.Generator, scale: float = 0.02
) -> torch.Tensor:
    """Normal bf16 numbers from a generator of one's own; the global one is left alone."""
    count = torch.Size(size).numel()
    drawn = torch.empty(min(count, DRAWN)).normal_(0, scale, generator=generator).bfloat16().to(device)
    return drawn.repeat(-(-count // len(drawn)))[:count].view(size)


def build_layer(
    shape: Shape, format: str, form: type[nn.Module], device: torch.device, generator: torch.Generator
) -> tuple[nn.Module, float]:
    """A decoder layer in a format, and the seconds that rounding to nearest and packing (or re-ordering) took.

    Args:
        form: how bf16 linears are held.
    """
    from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

    grid, shape, seconds = grid_of(format), narrowed_shape(shape, format), 0.0
    with torch.device("meta"):
        layer = Qwen2DecoderLayer(layer_config(shape), 0).eval()
    for name, parameter in list(layer.named_parameters()):
        if "norm" in name:
            _replace(layer, name, nn.Parameter(torch.ones(parameter.shape, dtype=torch.bfloat16, device=device), False))
    for name, size in shape.linears.items():
        weight = random_tensor(size, device, generator)
        linear = layer.get_submodule(name)
        bias = None if linear.bias is None else random_tensor((size[0],), device, generator)
        begun = time.perf_counter()
        packed = form(weight, bias) if grid is None else pack(PlainLinear(weight, bias), _round(weight, grid))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds += time.perf_counter() - begun
        _replace(layer, name, packed)
        del weight  # before the next one is drawn
    return layer, seconds


def _replace(root: nn.Module, name: str, value: nn.Module | nn.Parameter) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, value)


def _round(weight: torch.Tensor, grid: Grid) -> CompressedWeight:
    """Round to nearest, some output channels at a time: they do not depend on each other, and memory stays small."""
    parts, factor = [], None
    for part in weight.split(max(1, SLICE // weight.shape[1])):
        fit = fit_grid(part, grid, factor)
        parts.append(round_to_grid(part, grid, *fit))
        factor = fit.tensor_scale
    joined = (torch.cat([getattr(part, name) for part in parts]) for name in ("codes", "scales", "zeros"))
    return CompressedWeight(grid, *joined, factor)


class _Head(nn.Module):
    """Final norm and head; a large head is held in slices, so that re-ordering it never needs all of it twice."""

    def __init__(self, norm: nn.Module, slices: list[nn.Module]) -> None:
        super().__init__()
        self.norm, self.slices = norm, nn.ModuleList(slices)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        return torch.cat([part(x) for part in self.slices], dim=-1)


def build_head(shape: Shape, form: type[nn.Module], device: torch.device, generator: torch.Generator) -> nn.Module:
    """Final norm and bf16 head."""
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    norm = Qwen2RMSNorm(shape.hidden, shape.eps).to(device, torch.bfloat16)
    step = HEAD_SLICE // shape.hidden
    rows = [min(step, shape.vocab - start) for start in range(0, shape.vocab, step)]
    return _Head(norm, [form(random_tensor((count, shape.hidden), device, generator)) for count in rows])


def build_model(
    shape: Shape, format: str, form: type[nn.Module], generator: torch.Generator, device: torch.device = torch.device("cpu")
) -> nn.Module:
    """A whole causal model; in formats other than bf16 embedding and head, tied or not, are int8.

    Args:
        form: how bf16 linears, the head among them, are held; re-ordered ones do not share the embedding's memory.
    """
    from transformers import Qwen2ForCausalLM

    config = layer_config(shape, shape.layers)
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config).eval()
    first, _ = build_layer(shape, format, form, device, generator)
    model.model.layers = nn.ModuleList([first])
    add_copies(model.model.layers, shape.layers)
    model.model.norm.weight = nn.Parameter(torch.ones(shape.hidden, dtype=torch.bfloat16, device=device), False)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)  # its frequencies were on "meta"
    weight = random_tensor((shape.vocab, shape.hidden), device, generator)
    if grid_of(format) is None:
        model.model.embed_tokens.weight, model.lm_head = nn.Parameter(weight, False), form(weight)
    else:
        rounded = _round(weight, Grid(8, symmetric=True))
        embedding = PackedEmbedding(rounded)
        head = tied_head(embedding) if shape.tied else pack(PlainLinear(weight), rounded)
        model.model.embed_tokens, model.lm_head = embedding, head
    return model


def add_copies(layers: list[nn.Module] | nn.ModuleList, count: int) -> None:
    """Copy the first of `layers` until there are `count`, in place."""
    layers += [copy.deepcopy(layers[0]) for _ in range(count - len(layers))]


def layer_bytes(shape: Shape, format: Format, context: int = 0) -> int:
    """Bytes that one token must read of a layer: its weights, and the cache of `context` tokens."""
    own = narrowed_shape(shape, some_format(format))
    weights = sum(
        share * _linear_bytes(narrowed_shape(shape, one).linears[name], one)
        for name, shares in linear_formats(shape, format).items()
        for one, share in shares.items()
    )
    return BF16 * (own.small_parameters + own.kv_elements * context) + round(weights)


def _linear_bytes(size: tuple[int, int], format: str) -> int:
    grid = grid_of(format)
    return resident_bytes(grid, *size) if grid else BF16 * size[0] * size[1]


def distinct_linears(shape: Shape) -> dict[str, str]:
    """Name of every linear of a layer -> the first linear of the same size, whose time is its own."""
    first: dict[tuple[int, int], str] = {}
    return {name: first.setdefault(size, name) for name, size in shape.linears.items()}


def head_bytes(shape: Shape) -> int:
    """Bytes that one token must read of final norm and head."""
    return BF16 * shape.hidden * (shape.vocab + 1)


def kernels(layer: nn.Module, shape: Shape, rows: int) -> dict[str, str]:
    """Kernel that each linear of a layer runs for that many rows."""
    found = {name: layer.get_submodule(name) for name in shape.linears}
    return {name: one.kernel(rows) if isinstance(one, PackedLinear) else _form(one) for name, one in found.items()}


def _form(linear: nn.Module) -> str:
    return getattr(type(linear), "name", type(linear).__name__)
