"""qlib's own checkpoints: the codes of every format of the table at their true size, embedding and head included."""

from dataclasses import asdict
from typing import Any, Mapping, Sequence

from qlib.layers.storage import to_tensors as layer_tensors

__all__ = ["layer_tensors", "quantization_config"]


def quantization_config(layers: Mapping[str, Any], others: Sequence[str]) -> dict[str, Any]:
    """The entry of config.json: the grid of every packed module by its name."""
    return {"quant_method": "qlib", "layers": {name: asdict(layer.grid) for name, layer in layers.items()}}
