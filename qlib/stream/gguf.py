"""A GGUF file from a stream: the tensors of finished parts wait beside it, encoded, until one header can name them all.

It takes the disk space of the file twice for a moment; in memory are one block and pieces of embedding and head.
"""

import math
import os
from pathlib import Path
from typing import Any, Iterable, Iterator

import numpy as np
import torch
from gguf import GGMLQuantizationType
from safetensors import safe_open

from qlib.errors import UserError
from qlib.export import gguf
from qlib.export.gguf_blocks import encode, to_numpy
from qlib.export.gguf_file import TENSORS, architecture, open_file
from qlib.export.gguf_tokenizer import write_tokenizer
from qlib.models.checkpoint import read_header
from qlib.models.families import family_of
from qlib.models.load import Subject
from qlib.quantize.formats import Grid
from qlib.quantize.grid import fit_grid, round_to_grid
from qlib.stream.files import Layout
from qlib.stream.source import Stored

__all__ = ["check", "block_tensors", "end_tensors", "write_file", "FILE"]

FILE = "model.gguf"
DENSE = "f16"  # as `qlib.save` writes what is not packed
ALIGN = 32  # bytes that every tensor begins at a multiple of
SAMPLE = 8  # rows of a random weight that tells whether a grid fits


def check(subject: Subject, grids: dict[str, Grid]) -> None:
    """Refuse what `qlib.export.gguf` would, as far as shapes and grids tell.

    Args:
        grids: of every linear of the blocks, by its path.

    Raises:
        UserError: names the tensor and the reason.
    """
    shape = gguf.shape_of(subject)
    name = architecture(subject.config.model_type, shape)
    gguf.rope_factors(subject, name, shape)
    placed: set[int] = set()
    for tensor, module in gguf.modules_by_tensor(subject.model):
        placed |= {id(parameter) for parameter in module.parameters()}
        biased = getattr(module, "bias", None) is not None and not tensor.endswith(("attn_q", "attn_k", "attn_v"))
        if biased and name != "llama":
            raise UserError(f"gguf: {tensor}: llama.cpp's {name} has no bias there")
    if left := [path for path, parameter in subject.model.named_parameters() if id(parameter) not in placed]:
        raise UserError(f"gguf: there is no place for {left[0]}")
    tried: set[tuple[Grid, int]] = set()
    for path, grid in grids.items():
        width = subject.model.get_submodule(path).in_features
        if (grid, width) not in tried:
            tried.add((grid, width))
            weight = torch.randn(SAMPLE, width, generator=torch.Generator().manual_seed(0))
            _encode(round_to_grid(weight, grid, *fit_grid(weight, grid)), path)


def _encode(weight: Any, where: str, order: torch.Tensor | None = None) -> tuple[str, torch.Tensor]:
    """Type and bytes, uint8 `[rows, bytes]` or `[bytes]`, of a weight."""
    try:
        kind, data, _ = encode(weight, order, DENSE, requantize=False)
    except UserError as error:
        raise UserError(f"gguf: {where}: {error}") from None
    return kind.name, _bytes(data)


def _bytes(data: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(data).view(np.uint8))


def block_tensors(subject: Subject, index: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The bytes of every tensor of a block by GGUF's names, and their types as an entry of the manifest."""
    shape, where = gguf.shape_of(subject), f"{family_of(subject.config).blocks}.{index}"
    llama = architecture(subject.config.model_type, shape) == "llama"
    block, tensors, types = dict(subject.model.get_submodule(where).named_modules()), {}, {}
    for path, short in TENSORS.items():
        if (module := block.get(path)) is None:
            continue
        order = gguf.rotary_order(shape, short) if llama else None
        weight = module.compressed() if hasattr(module, "compressed") else module.weight.detach()
        name = f"blk.{index}.{short}"
        types[f"{name}.weight"], tensors[f"{name}.weight"] = _encode(weight, f"{where}.{path}", order)
        if (bias := getattr(module, "bias", None)) is not None:
            types[f"{name}.bias"], tensors[f"{name}.bias"] = "F32", _bytes(to_numpy(bias if order is None else bias[order]))
    return tensors, {"types": types}


def end_tensors(names: list[str], stored: Stored, config: Any) -> tuple[Layout, Iterable[torch.Tensor], dict[str, Any]]:
    """Layout, bytes and types of embedding, norm or head, made piece by piece while they are asked for."""
    family = family_of(config)
    known = {family.embedding: "token_embd", family.norm: "output_norm", family.head: "output"}
    layout, types = {}, {}
    for name in names:
        shape, short = stored.layout(name)[1], f"{known[name.removesuffix('.weight')]}.weight"
        types[short], size = ("F32", 4) if len(shape) == 1 else ("F16", 2)
        layout[short] = torch.uint8, (*shape[:-1], size * shape[-1])

    def pieces() -> Iterator[torch.Tensor]:
        for name in names:
            vector = len(stored.layout(name)[1]) == 1
            for piece in stored.pieces(name):
                yield _encode(piece if vector else piece[None], name)[1]

    return layout, pieces(), {"types": types}


def write_file(subject: Subject, types: dict[str, str], parts: list[Path], folder: Path, work: Path) -> int:
    """Put all parts behind one header, into a file that is there whole or not at all; returns its bytes.

    Args:
        types: of all tensors, in the order they are written. parts: safetensors files with their bytes.

    Raises:
        OSError: it cannot be written.
    """
    entries = {name: entry for part in parts for name, entry in read_header(part).items()}
    shape, partial = gguf.shape_of(subject), work / FILE
    name = architecture(subject.config.model_type, shape)
    writer = open_file(partial, name, shape)
    write_tokenizer(writer, subject.tokenizer, shape.vocab)
    factors = gguf.rope_factors(subject, name, shape)
    try:
        for tensor, kind in types.items():
            size = entries[tensor].shape
            writer.add_tensor_info(tensor, size, np.dtype(np.uint8), math.prod(size), GGMLQuantizationType[kind])
        if factors is not None:
            writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    with partial.open("ab") as file:
        for tensor in types:
            with safe_open(entries[tensor].file, "pt") as part:
                _append(file, part.get_tensor(tensor).numpy())
        if factors is not None:
            _append(file, factors)
        file.write(bytes(-file.tell() % ALIGN))
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, folder / FILE)
    return (folder / FILE).stat().st_size


def _append(file: Any, data: np.ndarray) -> None:
    file.write(bytes(-file.tell() % ALIGN))
    file.write(memoryview(data).cast("B"))
