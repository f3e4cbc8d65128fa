"""Write a subject as a checkpoint: packed codes at their true size, or an ordinary dense Hugging Face folder."""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlib.errors import UserError
from qlib.evaluate.footprint import measure_footprint
from qlib.layers import packed_layers
from qlib.layers.storage import to_tensors
from qlib.models.families import is_tied
from qlib.models.load import Subject
from qlib.record import Measurement

__all__ = ["save", "FORMATS"]

FORMATS = ("packed", "dense")


def save(subject: Subject, folder: str | Path, format: str = "packed") -> dict[str, Any]:
    """Write model, configuration and tokenizer into `folder`, which appears whole or not at all.

    Args:
        format: "packed" keeps compressed linears as codes, scales and zeros; "dense" writes their bf16 values, for
            programs that know no packed format.

    Returns:
        the ``size.*`` measurements: bytes on disk, bytes resident in memory, bits per weight.

    Raises:
        UserError: unknown format, or the folder cannot be written.
    """
    if format not in FORMATS:
        raise UserError(f"format: '{format}' is unknown; allowed: {', '.join(FORMATS)}")
    folder = Path(folder)
    partial = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write(subject, partial, format)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except PermissionError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    words = f"{format} format" if packed_layers(subject.model) else "bf16 weights"
    return {"size.disk_bytes": _disk_bytes(folder, words)} | measure_footprint(subject.model)


def _write(subject: Subject, folder: Path, format: str) -> None:
    from huggingface_hub import save_torch_state_dict

    model = subject.model
    layers = packed_layers(model)
    tensors = _plain_tensors(model, set(layers))
    config = subject.config.to_dict()
    config["architectures"] = [type(model).__name__]
    for name, layer in layers.items():
        compressed = layer.compressed()
        if format == "packed":
            tensors |= {f"{name}.{key}": value for key, value in to_tensors(compressed).items()}
        else:
            tensors[f"{name}.weight"] = compressed.dequantize().bfloat16()
        if layer.bias is not None:
            tensors[f"{name}.bias"] = layer.bias
    if layers and format == "packed":
        grids = {name: layer.grid for name, layer in layers.items()}
        config["quantization_config"] = {
            "quant_method": "qlib",
            "layers": {name: asdict(grid) for name, grid in grids.items()},
        }
    save_torch_state_dict({name: t.detach().contiguous() for name, t in tensors.items()}, folder, safe_serialization=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n", encoding="utf-8")
    subject.tokenizer.save_pretrained(folder)


def _plain_tensors(model: nn.Module, packed: set[str]) -> dict[str, torch.Tensor]:
    """Parameters outside packed layers; a tied head is stored once, under the embedding's name."""
    tied = f"{_name_of(model, model.get_output_embeddings())}.weight" if is_tied(model) else None
    named = model.named_parameters(remove_duplicate=False)
    return {name: p for name, p in named if name.rpartition(".")[0] not in packed and name != tied}


def _name_of(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, other in model.named_modules() if other is module)


def _disk_bytes(folder: Path, conditions: str) -> Measurement:
    """Bytes of the weight files; tokenizer and configuration are the same for every strategy and left out."""
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return Measurement(size, "bytes", method="size of the safetensors files", conditions=conditions)
