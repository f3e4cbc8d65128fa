"""qlib's own checkpoints: every format of the table at its true size, embedding and head included; pruned weights too."""

from dataclasses import asdict
from typing import Any, Mapping, Sequence

from torch import nn

from qlib.layers.sparse_storage import count_survivors, pays, sparse_tensors
from qlib.layers.storage import to_tensors as layer_tensors
from qlib.prune.mask import is_pruned

__all__ = ["layer_tensors", "quantization_config", "pruned_linears", "pruned_tensors"]


def quantization_config(layers: Mapping[str, Any], others: Sequence[str]) -> dict[str, Any]:
    """The entry of config.json: the grid of every packed module by its name."""
    return {"quant_method": "qlib", "layers": {name: asdict(layer.grid) for name, layer in layers.items()}}


def pruned_linears(model: nn.Module) -> dict[str, int | None]:
    """Every linear whose zeros are a mask, and how many weights are stored of it; None: all, because that takes less."""
    found = {}
    for name, module in model.named_modules():
        if is_pruned(module):
            survivors, shape = count_survivors(module), (module.out_features, module.in_features)
            found[name] = survivors if pays(getattr(module, "grid", None), shape, survivors) else None
    return found


def pruned_tensors(linear: nn.Module) -> dict[str, Any]:
    """What the checkpoint holds of a linear that is stored without its zeros, but for its bias."""
    return sparse_tensors(linear.compressed() if hasattr(linear, "compressed") else linear.weight.detach())
