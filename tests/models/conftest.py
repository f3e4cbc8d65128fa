"""A tiny original Qwen (`model_type: qwen`): ranks, configuration, random tensors, and a folder that holds them."""

import json
import unicodedata
from collections import Counter

import pytest
import regex
import torch
from original_qwen import PATTERN, TEXT, write_ranks


@pytest.fixture(scope="session")
def ranks():
    """Bytes in a scrambled order, then 150 merges trained on `TEXT`: rank of every token."""
    found = {bytes([7 * byte % 256]): byte for byte in range(256)}
    text = unicodedata.normalize("NFC", TEXT)
    pieces = [[bytes([b]) for b in piece.encode()] for piece in regex.findall(PATTERN, text)]
    for _ in range(150):
        pairs = Counter(pair for piece in pieces for pair in zip(piece, piece[1:]))
        (left, right), _ = max(pairs.items(), key=lambda item: (item[1], item[0]))
        found[left + right] = len(found)
        for piece in pieces:
            at = 0
            while at + 1 < len(piece):
                if (piece[at], piece[at + 1]) == (left, right):
                    piece[at : at + 2] = [left + right]
                at += 1
    return found


@pytest.fixture(scope="session")
def original_config(ranks):
    """config.json as the originals write it: four heads of 8, an FFN of 24, contexts of 32 that are scaled to 128."""
    return {
        "architectures": ["QWenLMHeadModel"],
        "auto_map": {"AutoConfig": "configuration_qwen.QWenConfig", "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"},
        "attn_dropout_prob": 0.0, "bf16": False, "emb_dropout_prob": 0.0, "fp16": False, "fp32": False, "hidden_size": 32,
        "initializer_range": 0.02, "intermediate_size": 48, "kv_channels": 8, "layer_norm_epsilon": 1e-5,
        "max_position_embeddings": 128, "model_type": "qwen", "no_bias": True, "num_attention_heads": 4,
        "num_hidden_layers": 2, "onnx_safe": None, "rotary_emb_base": 500, "rotary_pct": 1.0, "scale_attn_weights": True,
        "seq_length": 32, "tie_word_embeddings": False, "tokenizer_class": "QWenTokenizer",
        "transformers_version": "4.32.0", "use_cache": True, "use_dynamic_ntk": True, "use_flash_attn": "auto",
        "use_logn_attn": True, "vocab_size": len(ranks) + 208 + 16,
    }  # fmt: skip


@pytest.fixture
def original_tensors(original_config):
    """Random fp32 tensors under their original names, every one different."""
    hidden, ffn = original_config["hidden_size"], original_config["intermediate_size"] // 2
    block = {
        "ln_1.weight": (hidden,), "ln_2.weight": (hidden,), "attn.c_attn.weight": (3 * hidden, hidden),
        "attn.c_attn.bias": (3 * hidden,), "attn.c_proj.weight": (hidden, hidden), "mlp.w1.weight": (ffn, hidden),
        "mlp.w2.weight": (ffn, hidden), "mlp.c_proj.weight": (hidden, ffn),
    }  # fmt: skip
    shapes = {f"transformer.h.{index}.{name}": shape for index in range(2) for name, shape in block.items()}
    outside = {"transformer.wte.weight": (original_config["vocab_size"], hidden), "transformer.ln_f.weight": (hidden,)}
    shapes |= outside | {"lm_head.weight": outside["transformer.wte.weight"]}
    random = torch.Generator().manual_seed(0)
    draw = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
    return {name: 1 + 0.3 * t if ".ln_" in name else t if "wte" in name else 0.2 * t for name, t in draw.items()}


@pytest.fixture
def original_folder(tmp_path, ranks, original_config, original_tensors):
    """Write the checkpoint: ``original_folder({"seq_length": 64}, dtype=torch.float16, shard="20KB")`` -> folder."""
    from huggingface_hub import save_torch_state_dict

    def make(changes=(), tensors=None, dtype=torch.bfloat16, shard="5GB", name="original"):
        folder = tmp_path / name
        folder.mkdir()
        stored = {key: t.to(dtype) for key, t in (tensors or original_tensors).items()}
        save_torch_state_dict(stored, folder, max_shard_size=shard)
        (folder / "config.json").write_text(json.dumps(original_config | dict(changes)))
        write_ranks(folder / "qwen.tiktoken", ranks)
        (folder / "modeling_qwen.py").write_text("raise SystemExit('remote code ran')")
        (folder / "configuration_qwen.py").write_text("raise SystemExit('remote code ran')")
        return folder

    return make
