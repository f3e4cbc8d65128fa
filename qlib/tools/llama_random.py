"""A GGUF file of any of llama.cpp's kinds at a true shape, random weights: for its speed, without quantizing."""

import tempfile
from pathlib import Path
from typing import Any, Mapping

import numpy as np

from qlib.errors import UserError
from qlib.export.gguf_file import architecture, open_file, tensors_of_shape
from qlib.models.shapes import Shape
from qlib.tools.llama_quantize import quantize, tensors_of
from qlib.tools.llama_types import block_of, encode

__all__ = ["chosen_types", "shape_of_config", "write_kind"]

TILE = 64, 256  # random weights that are encoded once and repeated; rows of 256 fit blocks of every type
ROWS = 2  # of a narrow twin: a tensor of one row would count as a vector, and stay as it is


def shape_of_config(config: Any) -> Shape:
    """The dimensions in a Qwen2 configuration.

    Raises:
        UserError: another architecture.
    """
    if config.model_type != "qwen2":
        raise UserError(f"llama-cpp: random weights are written for qwen2, not for {config.model_type}")
    return Shape(
        "random",
        config.num_hidden_layers,
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.intermediate_size,
        config.vocab_size,
        tied=config.tie_word_embeddings,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        eps=config.rms_norm_eps,
        theta=config.rope_parameters["rope_theta"],
        context=config.max_position_embeddings,
    )


def write_kind(path: Path, shape: Shape, kind: str, outer: str = "F16", seed: int = 0) -> dict[str, str]:
    """A file of a Qwen2-architecture model in the types that llama.cpp itself takes for `kind`.

    Embedding and head are of type `outer`. Never holds more than one tensor. Returns the type of every tensor.
    """
    types = chosen_types(shape, kind, outer)
    _write(path, shape, types, seed=seed)
    return types


def chosen_types(shape: Shape, kind: str, outer: str = "F16") -> dict[str, str]:
    """Tensor -> type that llama.cpp chooses where it has an importance matrix.

    It chooses by architecture, name, layer and length of rows, so it is asked about a twin with two rows per linear.
    """
    with tempfile.TemporaryDirectory() as folder:
        twin, packed, matrix = (Path(folder) / name for name in ("twin.gguf", "packed.gguf", "matrix.npz"))
        _write(twin, shape, {}, ROWS)
        linears = {name: columns for name, (_, rows, columns) in tensors_of_shape(shape, "F16", outer) if rows}
        np.savez(matrix, **{name: np.ones(columns, np.float32) for name, columns in linears.items()})
        quantize(twin, packed, kind, matrix, outer)
        return {name: one.type for name, one in tensors_of(packed).items()}


def _write(path: Path, shape: Shape, types: Mapping[str, str], most: int | None = None, seed: int = 0) -> None:
    """A file of random weights, F32 where `types` is silent; `most`: rows of a linear at most."""
    writer = open_file(path, architecture("qwen2", shape), shape)
    writer.add_tokenizer_model("none")
    values, tiles, written = 0.02 * np.random.default_rng(seed).standard_normal(TILE, dtype=np.float32), {}, []
    for name, (_, rows, columns) in tensors_of_shape(shape, "F32", "F32"):
        type_, rows = types.get(name, "F32"), min(rows, most or rows)
        block = block_of(type_)
        size = max(rows, 1) * columns // block.weights * block.bytes
        # its own table of types is not asked where the dtype of the data is not uint8
        writer.add_tensor_info(name, (rows, columns) if rows else (columns,), np.dtype(np.float32), size, block.number)
        tiles.setdefault(type_, encode(values, type_))
        written.append((type_, size))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for type_, size in written:
        writer.write_tensor_data(np.resize(tiles[type_], size))
    writer.close()
