"""The tensors of an original Qwen (`model_type: qwen`) as Qwen2's, one at a time, without the code that comes with it.

The published modeling_qwen.py computes in every block, with RMS norms and rotary embedding on the halves of each head,

    x = x + attn.c_proj(attention(attn.c_attn(ln_1(x))))
    x = x + mlp.c_proj(mlp.w1(y) * silu(mlp.w2(y))),  y = ln_2(x)

which is Qwen2's block under other names: `c_attn` holds q, k and v one below the other, `w2` is gate and `w1` is up.
In bf16, last digits differ: the original turns queries and keys in fp32.
"""

import re
from pathlib import Path
from typing import Any, Iterator

import torch
from torch import nn

from qlib.errors import UserError
from qlib.models.checkpoint import TensorEntry, check_entries, read_entries, read_json, read_tensor
from qlib.models.packed import rebuild_buffers
from qlib.models.qwen1_config import context_note, convert_config, convert_generation
from qlib.models.qwen1_tokenizer import FILE, IM_END, IM_START, load_ranked

__all__ = ["qwen2_names", "convert_tensor", "expected_tensors", "check_original", "read_converted", "describe_original", "load_original"]

OUTSIDE = {
    "transformer.wte.weight": "model.embed_tokens.weight",
    "transformer.ln_f.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
INSIDE = {
    "ln_1": ("input_layernorm",),
    "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.c_proj": ("self_attn.o_proj",),
    "ln_2": ("post_attention_layernorm",),
    "mlp.w1": ("mlp.up_proj",),
    "mlp.w2": ("mlp.gate_proj",),
    "mlp.c_proj": ("mlp.down_proj",),
}
IN_BLOCK = re.compile(r"transformer\.h\.(\d+)\.(.+)\.(weight|bias)")
#: Constants that old versions stored beside the weights.
CONSTANT = re.compile(
    r"transformer\.(h\.\d+\.attn\.)?(rotary_emb\.inv_freq|masked_bias|logn_tensor|registered_causal_mask)"
)
STORED = ("BF16", "F16", "F32")


def qwen2_names(name: str) -> tuple[str, ...]:
    """What Qwen2 calls the parts of a tensor, from its first row to its last; none for a constant.

    Raises:
        UserError: no tensor of an original Qwen has this name.
    """
    if name in OUTSIDE:
        return (OUTSIDE[name],)
    if (found := IN_BLOCK.fullmatch(name)) and found[2] in INSIDE:
        return tuple(f"model.layers.{found[1]}.{part}.{found[3]}" for part in INSIDE[found[2]])
    if CONSTANT.fullmatch(name):
        return ()
    raise UserError(
        f"tensor '{name}' belongs to no original Qwen language model; allowed: transformer.wte, .h.*, .ln_f, lm_head"
    )


def convert_tensor(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The Qwen2 tensors in an original one: itself, or copies of the thirds `[out, in]` of `c_attn` `[3 out, in]`.

    Raises:
        UserError: an unknown name, or a first dimension that cannot be split.
    """
    names = qwen2_names(name)
    if len(names) < 2:
        return dict.fromkeys(names, tensor)
    if tensor.shape[0] % len(names):
        raise UserError(f"tensor '{name}' has shape {list(tensor.shape)}; allowed: rows in {len(names)} equal parts")
    return {new: part.clone() for new, part in zip(names, tensor.chunk(len(names)))}


def expected_tensors(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the original, from the configuration as `convert_config` gives it."""
    hidden, ffn, vocab = (config[name] for name in ("hidden_size", "intermediate_size", "vocab_size"))
    block = {
        "ln_1.weight": (hidden,),
        "attn.c_attn.weight": (3 * hidden, hidden),
        "attn.c_attn.bias": (3 * hidden,),
        "attn.c_proj.weight": (hidden, hidden),
        "ln_2.weight": (hidden,),
        "mlp.w1.weight": (ffn, hidden),
        "mlp.w2.weight": (ffn, hidden),
        "mlp.c_proj.weight": (hidden, ffn),
    }
    blocks = {
        f"transformer.h.{index}.{name}": shape
        for index in range(config["num_hidden_layers"])
        for name, shape in block.items()
    }
    head = {"transformer.ln_f.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    return {"transformer.wte.weight": (vocab, hidden)} | blocks | head


def check_original(entries: dict[str, TensorEntry], config: dict[str, Any], folder: Path) -> None:
    """Compare a checkpoint with its configuration, from the files' headers alone.

    Raises:
        UserError: a tensor that is missing, surplus, mis-shaped or holds no floats, naming file and tensor.
    """
    expected = expected_tensors(config)
    check_entries(entries, expected, folder)
    for name, entry in entries.items():
        if name not in expected and not CONSTANT.fullmatch(name):
            raise UserError(
                f"{entry.file}: tensor '{name}' belongs to no original Qwen language model of "
                f"{config['num_hidden_layers']} layers; allowed: {', '.join(OUTSIDE)}, transformer.h.*"
            )
        if name in expected and entry.dtype not in STORED:
            raise UserError(f"{entry.file}: tensor '{name}' is stored as {entry.dtype}; allowed: {', '.join(STORED)}")


def read_converted(
    entries: dict[str, TensorEntry], dtype: torch.dtype = torch.bfloat16
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and value of every Qwen2 tensor; one tensor of the original is read at a time.

    Raises:
        UserError: values that are not finite, naming file and tensor.
    """
    for name, entry in entries.items():
        if qwen2_names(name):
            yield from convert_tensor(name, read_tensor(name, entry).to(dtype)).items()


def load_original(folder: Path, raw: dict[str, Any]) -> tuple[nn.Module, Any, dict[str, str]]:
    """The checkpoint as a Qwen2 model in bf16, in memory, its tokenizer, and what there is to say about it.

    Args:
        raw: what config.json says.

    Raises:
        UserError: a file, a field or a tensor that does not fit.
    """
    model, tokenizer, entries, details = describe_original(folder, raw)
    model.load_state_dict(dict(read_converted(entries)), assign=True)
    return model, tokenizer, details


def describe_original(
    folder: Path, raw: dict[str, Any]
) -> tuple[nn.Module, Any, dict[str, TensorEntry], dict[str, str]]:
    """The checkpoint as a Qwen2 without weights, its tokenizer, its tensors, and what there is to say about it.

    The weights of the model lie on the meta device, its buffers are there.

    Args:
        raw: what config.json says.

    Raises:
        UserError: a file, a field or a tensor that does not fit.
    """
    from transformers import GenerationConfig, Qwen2Config

    from qlib.models.load import empty_model

    where = str(folder / "config.json")
    config, entries = convert_config(raw, where), read_entries(folder)
    check_original(entries, config, folder)
    tokenizer = load_ranked(folder / FILE)
    if len(tokenizer) > config["vocab_size"]:
        raise UserError(
            f"{where}: vocab_size: {config['vocab_size']} is not allowed; allowed: at least {len(tokenizer)} ({FILE})"
        )
    model = empty_model(Qwen2Config(**{"eos_token_id": tokenizer.eos_token_id} | config))
    rebuild_buffers(model, model.config)
    if (told := folder / "generation_config.json").is_file():
        ends = tokenizer.convert_tokens_to_ids([IM_END, IM_START])
        model.generation_config = GenerationConfig(**convert_generation(read_json(told), ends))
    note = context_note(raw, where)
    return model, tokenizer, entries, {"context": note} if note else {}
