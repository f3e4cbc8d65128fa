"""The methods that are tried on one layer: name, what it is called, recipe. Data alone, without torch."""

from dataclasses import dataclass
from typing import Any

__all__ = ["Method", "METHODS", "WIDTH_KEPT"]

#: Shares of heads and FFN channels that the strategy width-pruned keeps.
WIDTH_KEPT = 0.653
INT4, INT3 = {"bits": 4, "group_size": 128}, {"bits": 3, "group_size": 128}


@dataclass(frozen=True)
class Method:
    """A way to compress a layer.

    Attributes:
        title: what tables call it. family: decides its colour. recipe: its passes.
        never: why it is not tried on a layer of true shape, whatever the machine; empty: it is.
    """

    title: str
    family: str
    recipe: tuple[dict[str, Any], ...]
    never: str = ""


METHODS = {
    "rtn-int4": Method("Round to nearest, 4 bits", "weight_quantization", ({"pass": "rtn"} | INT4,)),
    "hqq-int4": Method("HQQ, 4 bits", "weight_quantization", ({"pass": "hqq"} | INT4,)),
    "awq-int4": Method("AWQ, 4 bits", "weight_quantization", ({"pass": "awq"}, {"pass": "rtn"} | INT4)),
    "gptq-int4": Method("GPTQ, 4 bits", "weight_quantization", ({"pass": "gptq"} | INT4,)),
    "gptq-int3": Method("GPTQ, 3 bits", "weight_quantization", ({"pass": "gptq"} | INT3,)),
    "wanda-50": Method("Wanda, half of the weights", "pruning", ({"pass": "wanda", "sparsity": 0.5},)),
    "sparsegpt-50": Method("SparseGPT, half of the weights", "pruning", ({"pass": "sparsegpt", "sparsity": 0.5},)),
    "joint-int4": Method(
        "Half of the weights and 4 bits in one solve", "combined", ({"pass": "joint", "sparsity": 0.5} | INT4,)
    ),
    "width-pruned": Method(
        "Width pruning", "pruning", ({"pass": "width", "keep_heads": WIDTH_KEPT, "keep_ffn": WIDTH_KEPT},)
    ),
    "signround-int4": Method("SignRound, 4 bits", "weight_quantization", ({"pass": "signround"} | INT4,)),
    "distilled-int4": Method(
        "Distillation after GPTQ, 4 bits", "weight_quantization", ({"pass": "gptq"} | INT4, {"pass": "distil"}),
        never="it tunes all layers together, and so needs the whole model in memory",
    ),
}  # fmt: skip
