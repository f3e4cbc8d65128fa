"""Which modules of a model hold codes, and how a checkpoint in qlib's packed format becomes such modules again."""

from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator

import torch
from safetensors import safe_open
from torch import nn

from qlib.errors import UserError
from qlib.layers import PackedLinear, pack
from qlib.layers.base import ADAPTER
from qlib.layers.embedding import PackedEmbedding, tied_head
from qlib.layers.sparse_storage import sparse_codes, sparse_floats
from qlib.layers.storage import expected_tensors, from_tensors
from qlib.models.checkpoint import TensorEntry
from qlib.models.families import family_of, is_tied
from qlib.prune.mask import mark_pruned
from qlib.quantize.grid import Grid

__all__ = ["coded_modules", "share_codes", "load_packed", "rebuild_buffers"]


def coded_modules(model: nn.Module) -> dict[str, PackedLinear | PackedEmbedding]:
    """Packed linears and embedding by name; codes that embedding and head share only under the embedding's name."""
    kinds = (PackedLinear, PackedEmbedding)
    found = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    if is_tied(model):
        found.pop(family_of(model.config).head, None)
    return found


def share_codes(model: nn.Module) -> bool:
    """Put a head on the codes of the embedding, if the configuration ties them; returns whether it does.

    Moving a model to another device tears shared buffers apart: call this again.
    """
    shared = model.config.tie_word_embeddings and isinstance(model.get_input_embeddings(), PackedEmbedding)
    if shared:
        model.set_output_embeddings(tied_head(model.get_input_embeddings()))
    return shared


def load_packed(folder: Path, config: Any, entries: dict[str, TensorEntry]) -> nn.Module:
    """Build the model of `config` with a packed layer wherever the checkpoint holds codes.

    Raises:
        UserError: a tensor of a layer is missing, or one does not fit the configuration.
    """
    from qlib.models.load import empty_model

    layers, pruned = config.quantization_config["layers"], config.quantization_config.get("pruned", {})
    adapters = config.quantization_config.get("adapters", {})
    del config.quantization_config  # transformers knows no method of this name
    model = empty_model(config)
    read = _reader(entries, folder)
    for name, fields in layers.items():
        module, grid = model.get_submodule(name), Grid(**fields)
        shape = tuple(module.weight.shape)
        survivors = pruned.get(name)
        parts = [*expected_tensors(grid, shape), *(["mask"] if survivors is not None else [])]
        tensors = {part: read(f"{name}.{part}") for part in parts}
        with _named(folder, name):
            told = (grid, tensors, shape)
            compressed = from_tensors(*told) if survivors is None else sparse_codes(*told, survivors)
        if getattr(module, "bias", None) is not None:
            module.bias = nn.Parameter(read(f"{name}.bias"), requires_grad=False)
        packed = PackedEmbedding(compressed) if isinstance(module, nn.Embedding) else pack(module, compressed)
        if name in adapters:
            with _named(folder, name):
                packed.adapt(*_adapter(read, name, adapters[name], shape))
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, packed)
    for name, survivors in pruned.items():
        linear = model.get_submodule(name)
        if survivors is not None and name not in layers:
            tensors = {part: read(f"{name}.{part}") for part in ("mask", "values")}
            with _named(folder, name):
                weight = sparse_floats(tensors, tuple(linear.weight.shape), survivors)
            linear.weight = nn.Parameter(weight, requires_grad=False)
        mark_pruned(linear)
    shared = share_codes(model)
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
    rebuild_buffers(model, config)
    if not shared:
        model.tie_weights()
    return model


def _adapter(read: Any, name: str, rank: int, shape: tuple[int, int]) -> list[torch.Tensor]:
    """Both tensors of an adapter, `[rank, in]` and `[out, rank]`."""
    tensors = [read(f"{name}.{part}") for part in ADAPTER]
    for part, tensor, wanted in zip(ADAPTER, tensors, ((rank, shape[1]), (shape[0], rank))):
        if tuple(tensor.shape) != wanted:
            raise UserError(f"'{part}' has shape {list(tensor.shape)}, expected {list(wanted)}")
    return tensors


@contextmanager
def _named(folder: Path, name: str) -> Iterator[None]:
    """Say in which checkpoint and linear it is that something does not fit."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{folder}: {name}: {error}") from None


def _reader(entries: dict[str, TensorEntry], folder: Path):
    def read(name: str) -> torch.Tensor:
        if name not in entries:
            raise UserError(f"{folder}: tensor '{name}' is missing from the safetensors files")
        with safe_open(entries[name].file, "pt") as file:
            return file.get_tensor(name)

    return read


def rebuild_buffers(model: nn.Module, config: Any) -> None:
    """Buffers that no checkpoint stores (rotary frequencies) were left on the meta device: make them anew."""
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, type(module)(config=config))
