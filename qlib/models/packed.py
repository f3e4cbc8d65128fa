"""Read a checkpoint in qlib's packed format back into packed layers."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from qlib.errors import UserError
from qlib.layers import pack
from qlib.layers.storage import expected_tensors, from_tensors
from qlib.models.checkpoint import TensorEntry
from qlib.quantize.grid import Grid

__all__ = ["load_packed"]


def load_packed(folder: Path, config: Any, entries: dict[str, TensorEntry]) -> nn.Module:
    """Build the model of `config` with a packed layer wherever the checkpoint holds codes.

    Raises:
        UserError: a tensor of a layer is missing, or one does not fit the configuration.
    """
    from qlib.models.load import empty_model

    layers = config.quantization_config["layers"]
    del config.quantization_config  # transformers knows no method of this name
    model = empty_model(config)
    read = _reader(entries, folder)
    for name, fields in layers.items():
        linear, grid = model.get_submodule(name), Grid(**fields)
        shape = (linear.out_features, linear.in_features)
        tensors = {part: read(f"{name}.{part}") for part in expected_tensors(grid, shape)}
        bias = None if linear.bias is None else nn.Parameter(read(f"{name}.bias"), requires_grad=False)
        compressed = from_tensors(grid, tensors, shape)
        linear.bias = bias
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, pack(linear, compressed))
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            tensor = read(name)
            if tensor.shape != parameter.shape:
                raise UserError(
                    f"{entries[name].file}: tensor '{name}' has shape {list(tensor.shape)}, config.json asks for "
                    f"{list(parameter.shape)}"
                )
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, nn.Parameter(tensor, requires_grad=False))
    _rebuild_buffers(model, config)
    model.tie_weights()
    return model


def _reader(entries: dict[str, TensorEntry], folder: Path):
    def read(name: str) -> torch.Tensor:
        if name not in entries:
            raise UserError(f"{folder}: tensor '{name}' is missing from the safetensors files")
        with safe_open(entries[name].file, "pt") as file:
            return file.get_tensor(name)

    return read


def _rebuild_buffers(model: nn.Module, config: Any) -> None:
    """Buffers that no checkpoint stores (rotary frequencies) were left on the meta device: make them anew."""
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, type(module)(config=config))
