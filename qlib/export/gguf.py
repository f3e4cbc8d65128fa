"""Write a subject as a GGUF file, which llama.cpp loads: packed weights with their very values, or not at all."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from qlib.errors import UserError
from qlib.export.gguf_blocks import encode, to_numpy
from qlib.export.gguf_file import TENSORS, architecture, block_bits, open_file, tensor_types
from qlib.export.gguf_tokenizer import write_tokenizer
from qlib.models.families import blocks_of, family_of, is_tied, linears_of
from qlib.models.load import Subject
from qlib.models.shapes import Shape
from qlib.quantize.grid import CompressedWeight

__all__ = ["export", "importance", "shape_of", "modules_by_tensor", "rotary_order", "rope_factors"]

ACTIVATIONS = "activations are rounded llama.cpp's way, 32 at a time, instead of token by token"


def export(
    subject: Subject, path: str | Path, dense: Literal["f16", "bf16", "f32"] = "f16", requantize: bool = False
) -> dict[str, Any]:
    """Write `subject` to a file.

    Args:
        path: a ``.gguf`` file, or a folder that gets ``model.gguf``.
        dense: type of embedding, head and linears that are not packed. bf16 and f32 are exact; in f16 weights below
            2^-14 lose bits.
        requantize: round packed weights that no type of GGUF can hold anew, to Q8_0, instead of refusing them.

    Returns:
        file, bytes, architecture, types (tensor -> type), bits_per_weight (of the linears in blocks, as stored),
        rounding (greatest distance of a packed weight from its value, in steps of its grid; 0: exact), and notes.

    Raises:
        UserError: something that llama.cpp cannot compute, or a weight that GGUF cannot hold; it says which and why.
    """
    path = Path(path)
    path = path if path.suffix == ".gguf" else path / "model.gguf"
    model, shape, kind = subject.model, shape_of(subject), subject.config.model_type
    name = architecture(kind, shape)
    notes = ["written as 'llama', which computes the same: llama.cpp's qwen2 has another width of heads"]
    notes = notes if (kind, name) == ("qwen2", "llama") else []
    writer = open_file(path, name, shape, temporary=True)
    notes += write_tokenizer(writer, subject.tokenizer, shape.vocab)
    written, rounding = set(), 0.0
    try:
        for tensor, module in modules_by_tensor(model):
            order = rotary_order(shape, tensor) if name == "llama" else None
            weight = module.compressed() if hasattr(module, "compressed") else module.weight.detach()
            where = f"{tensor} ({type(module).__name__})"
            try:
                type_, data, moved = encode(weight, order, dense, requantize)
            except UserError as error:
                raise UserError(f"gguf: {where}: {error}") from None
            writer.add_tensor(f"{tensor}.weight", data, raw_dtype=type_)
            rounding = max(rounding, moved)
            if isinstance(weight, CompressedWeight) and weight.grid.activations and ACTIVATIONS not in notes:
                notes.append(ACTIVATIONS)
            if (bias := getattr(module, "bias", None)) is not None:
                if name != "llama" and not tensor.endswith(("attn_q", "attn_k", "attn_v")):
                    raise UserError(f"gguf: {where}: llama.cpp's {name} has no bias there")
                writer.add_tensor(f"{tensor}.bias", to_numpy(bias if order is None else bias[order]))
            written |= {id(parameter) for parameter in module.parameters()}
        if left := [path for path, parameter in model.named_parameters() if id(parameter) not in written]:
            raise UserError(f"gguf: there is no place for {left[0]}")
        if (factors := rope_factors(subject, name, shape)) is not None:
            writer.add_tensor("rope_freqs.weight", factors)
        path.parent.mkdir(parents=True, exist_ok=True)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    bits = block_bits(path)
    return {
        "file": str(path), "bytes": path.stat().st_size, "architecture": name, "types": tensor_types(path),
        "bits_per_weight": bits, "rounding": rounding, "notes": notes,
    }  # fmt: skip


def shape_of(subject: Subject) -> Shape:
    """The dimensions as GGUF wants them. A sliding window, which llama.cpp would ignore, bounds the context."""
    config = subject.config
    linear = linears_of(subject.model, blocks_of(subject.model)[0])["self_attn.q_proj"]
    return Shape(
        subject.source.name,
        config.num_hidden_layers,
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.intermediate_size,
        config.vocab_size,
        tied=is_tied(subject.model),
        head_dim=linear.out_features // config.num_attention_heads,
        eps=config.rms_norm_eps,
        theta=config.rope_parameters["rope_theta"],
        context=min(config.max_position_embeddings, getattr(config, "sliding_window", None) or 2**31),
    )


def modules_by_tensor(model: nn.Module):
    """Every module with a weight and its tensor's name, without ``.weight``; a tied head is not there."""
    family = family_of(model.config)
    yield "token_embd", model.get_submodule(family.embedding)
    for index, block in enumerate(blocks_of(model)):
        here = dict(block.named_modules())
        yield from ((f"blk.{index}.{name}", here[path]) for path, name in TENSORS.items() if path in here)
    yield "output_norm", model.get_submodule(family.norm)
    if not is_tied(model):
        yield "output", model.get_submodule(family.head)


def rotary_order(shape: Shape, tensor: str) -> torch.Tensor | None:
    """Rows of q and k so that channels rotated together, i and i + half, become neighbours; None for other tensors."""
    heads = {"attn_q": shape.heads, "attn_k": shape.kv_heads}.get(tensor.rpartition(".")[2])
    rows = None if heads is None else torch.arange(heads * shape.head_dim).view(heads, 2, -1)
    return None if rows is None else rows.transpose(1, 2).flatten()


def rope_factors(subject: Subject, name: str, shape: Shape) -> np.ndarray | None:
    """What llama.cpp divides the rotary frequencies by, `[head_dim / 2]`; None where they are the plain ones."""
    kind = subject.config.rope_parameters.get("rope_type", "default")
    if kind == "default":
        return None
    if kind not in ("linear", "llama3") or name != "llama":
        raise UserError(f"gguf: rope_type '{kind}' cannot be written for llama.cpp's {name}; allowed: default")
    plain = shape.theta ** -(torch.arange(0, shape.head_dim, 2) / shape.head_dim)
    return to_numpy(plain / subject.model.model.rotary_emb.inv_freq.float().cpu())


@torch.inference_mode()
def importance(model: nn.Module, ids: list[torch.Tensor]) -> dict[str, np.ndarray]:
    """What llama.cpp calls an importance matrix: the mean square of every input channel of every linear in a block.

    Args:
        ids: token ids `[rows, tokens]` of each batch.

    Returns:
        tensor's name -> fp32 `[in]`.
    """
    sums: dict[str, torch.Tensor] = {}
    hooks, tokens = [], sum(batch.numel() for batch in ids)
    for index, block in enumerate(blocks_of(model)):
        for path, linear in linears_of(model, block).items():

            def feed(module, inputs, name=f"blk.{index}.{TENSORS[path]}.weight"):
                sums[name] = sums.get(name, 0) + inputs[0].float().square().flatten(0, -2).sum(0)

            hooks.append(linear.register_forward_pre_hook(feed))
    try:
        for batch in ids:
            model(input_ids=batch.to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: to_numpy(total / tokens) for name, total in sums.items()}
