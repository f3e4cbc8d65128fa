"""True shapes of named Qwen models: what latency and size depend on, without a single trained weight."""

import json
from dataclasses import dataclass, replace
from typing import Any

from qlib.errors import UserError, nearest
from qlib.paths import MODELS, REFERENCE, shipped_model

__all__ = ["FFN_STEP", "Shape", "SHAPES", "kept_width", "find_shape", "layer_config"]

#: What the width of a pruned FFN is a multiple of: the group size of most number formats.
FFN_STEP = 128


@dataclass(frozen=True)
class Shape:
    """Dimensions of a Qwen2-architecture model.

    Attributes:
        layers, hidden, heads, kv_heads, ffn, vocab: as in its configuration; `ffn` is the width of gate and up.
        tied: the head shares the embedding's weight.
        head_dim: width of a head.
        eps: of the norms. theta: base of the rotary embedding. context: longest trained context.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    tied: bool = False
    head_dim: int = 128
    eps: float = 1e-6
    theta: float = 1e6
    context: int = 32768

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Name of every linear of a layer and its weight's `[out, in]`."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (queries, self.hidden),
            "self_attn.k_proj": (keys, self.hidden),
            "self_attn.v_proj": (keys, self.hidden),
            "self_attn.o_proj": (self.hidden, queries),
            "mlp.gate_proj": (self.ffn, self.hidden),
            "mlp.up_proj": (self.ffn, self.hidden),
            "mlp.down_proj": (self.hidden, self.ffn),
        }

    @property
    def linear_parameters(self) -> int:
        """Weights in the linears of one layer: what compressing works on."""
        return sum(rows * columns for rows, columns in self.linears.values())

    @property
    def small_parameters(self) -> int:
        """Biases of q, k, v and two norms: the rest of one layer."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim + 2 * self.hidden

    @property
    def layer_parameters(self) -> int:
        return self.linear_parameters + self.small_parameters

    @property
    def parameters(self) -> int:
        """All weights of the model; a tied head counts once."""
        return self.layers * self.layer_parameters + self.hidden + self.vocab * self.hidden * (1 if self.tied else 2)

    def narrowed(self, keep_heads: float, keep_ffn: float) -> "Shape":
        """The shape after width pruning; see `kept_width`."""
        heads, kv_heads, ffn = kept_width(self.heads, self.kv_heads, self.ffn, keep_heads, keep_ffn)
        return replace(self, heads=heads, kv_heads=kv_heads, ffn=ffn)

    @property
    def kv_elements(self) -> int:
        """Numbers that the cache of one layer keeps for each token."""
        return 2 * self.kv_heads * self.head_dim


def kept_width(
    heads: int, kv_heads: int, ffn: int, keep_heads: float, keep_ffn: float, multiple: int = FFN_STEP
) -> tuple[int, int, int]:
    """Heads, key-value heads and FFN width that are left of shares to keep.

    Where several query heads share keys and values, each group loses query heads and keeps its keys; where each head
    has its own, they go together. An FFN width that is a multiple of `multiple` stays one, so that groups of weights still
    fit; any other is cut channel by channel.

    Raises:
        UserError: a share outside (0, 1], or one that would leave nothing.
    """
    for name, share in (("keep_heads", keep_heads), ("keep_ffn", keep_ffn)):
        if not 0 < share <= 1:
            raise UserError(f"{name}: {share} is not allowed; allowed: more than 0, at most 1")
    per_group = heads // kv_heads
    left, whole = (round(keep_heads * kv_heads), kv_heads) if per_group == 1 else (round(keep_heads * per_group), per_group)
    step = multiple if ffn % multiple == 0 else 1
    width = round(keep_ffn * ffn / step) * step
    if left < 1:
        what = "head of the model" if per_group == 1 else "query head of a group"
        raise UserError(f"keep_heads: {keep_heads} of {whole} would remove every {what}; allowed: at least {0.5 / whole:.3g}")
    if width < 1:
        raise UserError(f"keep_ffn: {keep_ffn} of {ffn} channels would remove all; allowed: at least {step / ffn:.3g}")
    return (left, left, width) if per_group == 1 else (left * kv_heads, kv_heads, width)


#: The published models. The original Qwen-72B (every head its own keys and values) is given as its Qwen2 equivalent.
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("qwen-72b", 80, 8192, 64, 64, 24576, 152064),
        Shape("qwen2.5-72b", 80, 8192, 64, 8, 29568, 152064),
        Shape("qwen2.5-32b", 64, 5120, 40, 8, 27648, 152064),
        Shape("qwen2.5-7b", 28, 3584, 28, 4, 18944, 152064),
        Shape("qwen2.5-1.5b", 28, 1536, 12, 2, 8960, 151936, tied=True),
        Shape("qwen2.5-0.5b", 24, 896, 14, 2, 4864, 151936, tied=True, head_dim=64),
    )
}


def find_shape(name: str) -> Shape:
    """The shape of a model by name: one of `SHAPES`, or a shipped model, whose configuration tells it.

    Raises:
        UserError: unknown name.
    """
    if shipped := shipped_model(name):
        return _read(shipped)
    if name not in SHAPES:
        known = [*SHAPES, REFERENCE]
        raise UserError(f"model: no true shape is known for '{name}'{nearest(name, known)}; known: {', '.join(known)}")
    return SHAPES[name]


def _read(name: str) -> Shape:
    config = json.loads((MODELS / name / "config.json").read_text(encoding="utf-8"))
    rotary = config.get("rope_parameters") or {}
    return Shape(
        name,
        config["num_hidden_layers"],
        config["hidden_size"],
        config["num_attention_heads"],
        config["num_key_value_heads"],
        config["intermediate_size"],
        config["vocab_size"],
        tied=config["tie_word_embeddings"],
        head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        eps=config["rms_norm_eps"],
        theta=rotary.get("rope_theta") or config.get("rope_theta") or Shape.theta,
        context=config["max_position_embeddings"],
    )


def layer_config(shape: Shape, layers: int = 1) -> Any:
    """The `transformers.Qwen2Config` of a model of this shape that has only `layers` layers."""
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        rms_norm_eps=shape.eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.theta},
        max_position_embeddings=shape.context,
        tie_word_embeddings=shape.tied,
        attn_implementation="sdpa",
    )
