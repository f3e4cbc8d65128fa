"""Write a subject as a checkpoint: packed codes at their true size, or an ordinary dense Hugging Face folder."""

import json
import os
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlib.errors import UserError
from qlib.evaluate.footprint import measure_footprint
from qlib.export import packed
from qlib.layers import PackedLinear
from qlib.layers.base import ADAPTER
from qlib.models.families import family_of, is_tied
from qlib.models.load import Subject
from qlib.models.packed import coded_modules
from qlib.record import Measurement

__all__ = ["save", "checkpoint_tensors", "write_rest", "FORMATS"]

FORMATS = ("packed", "dense", "gptq", "compressed_tensors", "gguf")


def save(subject: Subject, folder: str | Path, format: str = "packed") -> dict[str, Any]:
    """Write model, configuration and tokenizer into `folder`, which appears whole or not at all.

    Args:
        format: "packed" keeps whatever is compressed as codes, scales and zeros, and of what was pruned a mask and the
            weights that stayed; "dense" writes bf16 values, for programs
            that know no packed format; "gptq" and "compressed_tensors" write the linears of the blocks as other programs
            read them, and embedding and head in bf16; "gguf" writes one file for llama.cpp.

    Returns:
        the ``size.*`` measurements: bytes on disk, bytes resident in memory, bits per weight.

    Raises:
        UserError: unknown format, a weight that the format cannot hold, or a folder that cannot be written.
    """
    if format not in FORMATS:
        raise UserError(f"format: '{format}' is unknown; allowed: {', '.join(FORMATS)}")
    folder = Path(folder)
    partial = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        written = _write_gguf(subject, partial) if format == "gguf" else _write(subject, partial, format)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except PermissionError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    words = f"{format} format" if coded_modules(subject.model) else "bf16 weights"
    if format == "packed" and any(packed.pruned_linears(subject.model).values()):
        words += ", masks and what stayed"
    return {"size.disk_bytes": _disk_bytes(folder, words)} | measure_footprint(subject.model) | written


def _write_gguf(subject: Subject, folder: Path) -> dict[str, Any]:
    """One file; what it takes for a weight of the blocks is not what our own format takes."""
    from qlib.export.gguf import export

    if any(getattr(one, "adapter_up", None) is not None for one in subject.model.modules()):
        raise UserError("gguf: a linear has an adapter beside its codes, for which the format has no place; merge it")
    bits = export(subject, folder)["bits_per_weight"]
    return {"size.bits_per_weight": Measurement(bits, "bits", method="types of the file", conditions="linears of the blocks")}


def _write(subject: Subject, folder: Path, format: str) -> dict[str, Any]:
    from huggingface_hub import save_torch_state_dict

    tensors, entry = checkpoint_tensors(subject.model, format)
    save_torch_state_dict(tensors, folder, safe_serialization=True)
    if entry and (name := getattr(import_module(f"qlib.export.{format}"), "CONFIG_FILE", None)):
        _write_json(folder / name, entry)
    write_rest(subject, folder, entry)
    return {}


def checkpoint_tensors(model: nn.Module, format: str = "packed") -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What a checkpoint holds of a model, or of as much of it as is there: tensors on the meta device are left out.

    Returns:
        the tensors by name, and the entry ``quantization_config`` of config.json, empty for plain weights.

    Raises:
        UserError: a layer holds what the format cannot say.
    """
    coded, written, entry = coded_modules(model), None, {}
    tensors = _plain_tensors(model, set(coded))
    blocks = f"{family_of(model.config).blocks}."
    held = {name: one for name, one in coded.items() if format == "packed" or name.startswith(blocks)}
    if format == "dense":
        held = {}
    pruned = packed.pruned_linears(model) if format == "packed" else {}
    if held or pruned:  # asked first, because it refuses what the format cannot say
        linears = [name for name, one in model.named_modules() if isinstance(one, (nn.Linear, PackedLinear))]
        written = import_module(f"qlib.export.{format}")
        entry = written.quantization_config(held, [name for name in linears if name not in held])
    if pruned:
        entry["pruned"] = pruned
    sparse = {name for name, survivors in pruned.items() if survivors is not None}
    for name in sparse:
        tensors |= {f"{name}.{key}": value for key, value in packed.pruned_tensors(model.get_submodule(name)).items()}
        tensors.pop(f"{name}.weight", None)
    adapted = {name: layer for name, layer in coded.items() if getattr(layer, "adapter_up", None) is not None}
    if adapted and format not in ("packed", "dense"):
        raise UserError(f"{format}: {next(iter(adapted))} has an adapter beside its codes, for which the format has no place; merge it")
    if adapted and format == "packed":
        entry["adapters"] = {name: len(layer.adapter_down) for name, layer in adapted.items()}
        tensors |= {f"{name}.{part}": getattr(layer, part) for name, layer in adapted.items() for part in ADAPTER}
    for name, layer in coded.items():
        if getattr(layer, "bias", None) is not None:
            tensors[f"{name}.bias"] = layer.bias
        if name in sparse:
            continue
        compressed = layer.compressed()
        own = written.layer_tensors(compressed) if name in held else {"weight": _effective(layer).bfloat16()}
        tensors |= {f"{name}.{key}": value for key, value in own.items()}
    return {name: t.detach().contiguous() for name, t in tensors.items() if not t.is_meta}, entry


def write_rest(subject: Subject, folder: Path, entry: dict[str, Any]) -> None:
    """Write what lies beside the weights: tokenizer and configuration; config.json, without which nothing loads, last.

    Args:
        entry: ``quantization_config`` of config.json, or empty.
    """
    config = subject.config.to_diff_dict()
    config.pop("_name_or_path", None)  # a folder of this machine
    config["architectures"] = [type(subject.model).__name__]
    if rope := config.get("rope_parameters"):  # transformers 4 looks elsewhere, or silently takes a base of 10000
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        config["rope_theta"] = rope["rope_theta"]
        config |= {"rope_scaling": scaling} if rope.get("rope_type", "default") != "default" else {}
    if entry:
        config["quantization_config"] = entry
    subject.tokenizer.save_pretrained(folder)
    if (generation := getattr(subject.model, "generation_config", None)) is not None:
        _write_json(folder / "generation_config.json", generation.to_diff_dict())
    _write_json(folder / "config.json", config)


def _effective(layer: nn.Module) -> torch.Tensor:
    """The fp32 weight of a packed linear or embedding."""
    return layer.effective_weight() if isinstance(layer, PackedLinear) else layer.compressed().dequantize()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")


def _plain_tensors(model: nn.Module, packed: set[str]) -> dict[str, torch.Tensor]:
    """Parameters outside packed layers; a tied head is stored once, under the embedding's name."""
    tied = f"{_name_of(model, model.get_output_embeddings())}.weight" if is_tied(model) else None
    named = model.named_parameters(remove_duplicate=False)
    return {name: p for name, p in named if name.rpartition(".")[0] not in packed and name != tied}


def _name_of(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, other in model.named_modules() if other is module)


def _disk_bytes(folder: Path, conditions: str) -> Measurement:
    """Bytes of the weight files; tokenizer and configuration are the same for every strategy and left out."""
    size = sum(file.stat().st_size for kind in ("*.safetensors", "*.gguf") for file in folder.glob(kind))
    return Measurement(size, "bytes", method="size of the weight files", conditions=conditions)
