"""What every GGUF file of ours has in common: header, names of tensors, blocks of 32 weights; no model needed."""

from pathlib import Path
from typing import Iterator

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFWriter, quants

from qlib.models.shapes import Shape

__all__ = ["BLOCK", "TENSORS", "architecture", "open_file", "write_random", "tensors_of_shape", "tensor_types", "block_bits"]

BLOCK = 32  # weights that share a scale in Q4_0, Q4_1, Q8_0 and MXFP4
#: Modules of a decoder block, and what GGUF calls them.
TENSORS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def architecture(kind: str, shape: Shape) -> str:
    """The architecture of llama.cpp that computes a model of type `kind`.

    Its qwen2 wants heads x width of a head to be the hidden size. Others are written as llama, which takes any width
    and has optional biases, but rotates neighbouring channels: rows of q and k then stand in another order.
    """
    if kind == "qwen2" and shape.heads * shape.head_dim == shape.hidden:
        return "qwen2"
    return "qwen3" if kind == "qwen3" else "llama"


def open_file(path: Path, name: str, shape: Shape, temporary: bool = False) -> GGUFWriter:
    """A writer that has the hyperparameters of `shape` already.

    Args:
        name: the architecture. temporary: collect tensors on disk instead of in memory.
    """
    writer = GGUFWriter(path, name, use_temp_file=temporary)
    writer.add_name(shape.name)
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.theta)
    writer.add_layer_norm_rms_eps(shape.eps)
    writer.add_vocab_size(shape.vocab)
    return writer


def write_random(path: Path, shape: Shape, kind: str, head: str, seed: int = 0) -> None:
    """A file of a Qwen2-architecture model with random weights, never holding more than one tensor.

    Args:
        kind: type of the linears, such as ``Q4_0``. head: type of embedding and head.
    """
    writer = open_file(path, architecture("qwen2", shape), shape)
    writer.add_tokenizer_model("none")
    generator = np.random.default_rng(seed)
    tensors = dict(tensors_of_shape(shape, kind, head))
    for name, (type_, rows, columns) in tensors.items():
        block, size = GGML_QUANT_SIZES[type_]
        width = columns // block * size
        sizes = (rows, width) if rows else (width,)
        writer.add_tensor_info(name, sizes, np.dtype(np.uint8), max(rows, 1) * width, type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    values = 0.02 * generator.standard_normal(2**18, dtype=np.float32)
    tiles = {type_: quants.quantize(values, type_).view(np.uint8) for type_ in {t for t, _, _ in tensors.values()}}
    for type_, rows, columns in tensors.values():
        block, size = GGML_QUANT_SIZES[type_]
        writer.write_tensor_data(np.resize(tiles[type_], max(rows, 1) * columns // block * size))
    writer.close()


def tensors_of_shape(shape: Shape, kind: str, head: str) -> Iterator[tuple[str, tuple[GGMLQuantizationType, int, int]]]:
    """Name, type, rows (0: a vector) and columns of every tensor."""
    linear, outer, plain = (GGMLQuantizationType[name] for name in (kind, head, "F32"))
    yield "token_embd.weight", (outer, shape.vocab, shape.hidden)
    for layer in range(shape.layers):
        for name, (rows, columns) in shape.linears.items():
            yield f"blk.{layer}.{TENSORS[name]}.weight", (linear, rows, columns)
            if TENSORS[name] in ("attn_q", "attn_k", "attn_v"):
                yield f"blk.{layer}.{TENSORS[name]}.bias", (plain, 0, rows)
        for name in ("attn_norm", "ffn_norm"):
            yield f"blk.{layer}.{name}.weight", (plain, 0, shape.hidden)
    yield "output_norm.weight", (plain, 0, shape.hidden)
    if not shape.tied:
        yield "output.weight", (outer, shape.vocab, shape.hidden)


def tensor_types(path: Path) -> dict[str, str]:
    """Name and type of every tensor of a file."""
    return {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(path).tensors}


def block_bits(path: Path) -> float:
    """Bits that a weight of a linear in the decoder blocks takes on average, scales included."""
    linears = [one for one in GGUFReader(path).tensors if one.name.startswith("blk.") and len(one.shape) == 2]
    return 8 * sum(one.n_bytes for one in linears) / sum(one.n_elements for one in linears)
