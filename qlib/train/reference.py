"""The steps of making a reference model that are not training itself: shape, random weights, saving, model card."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from qlib.params import Evaluation
from qlib.paths import write_atomic
from qlib.train.acceptance import Acceptance, accept
from qlib.train.card import write_card

__all__ = ["configuration", "random_model", "start_from", "shuffled", "describe", "save", "accept_and_card"]


def configuration(
    vocabulary: int, hidden: int, layers: int, heads: int, kv_heads: int, head_dim: int, ffn: int, context: int = 1024
) -> Any:
    """A Qwen2 configuration with tied embeddings."""
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=ffn,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )


def random_model(config: Any, seed: int) -> nn.Module:
    """Random fp32 weights from `seed`; the caller's random state is left as it was.

    Attention is computed in the plain form: on a CPU its backward pass is faster for short sequences than the fused one.
    """
    from transformers import Qwen2ForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM._from_config(config, attn_implementation="eager", dtype=torch.float32)


def start_from(name: str) -> tuple[nn.Module, Any, dict[str, Any]]:
    """A trained model in fp32 to go on from, its tokenizer, and the record of its training (only a name if it has none)."""
    from qlib.models.load import load

    subject = load(name)
    model = random_model(subject.config, 0)
    model.load_state_dict({key: value.float() for key, value in subject.model.state_dict().items()})
    model.tie_weights()
    file = subject.source.folder / "training.json"
    earlier = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return model, subject.tokenizer, earlier | {"name": subject.source.name}


def shuffled(texts: list[str], seed: int) -> list[str]:
    """The documents in random order: package by package, the end of the training would see only the last packages."""
    return [texts[index] for index in np.random.default_rng(seed).permutation(len(texts))]


def describe(
    training: dict[str, Any], model: nn.Module, stream: np.ndarray, manifest: Path, earlier: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Add to a training record what was trained on what, and where; and from which training it went on."""
    from qlib.runs.provenance import provenance

    where = provenance()
    first = manifest.read_text(encoding="utf-8").partition("\n")[0]
    return training | {
        "tokens": training["step"] * training["schedule"]["batch_tokens"],
        "stream_tokens": len(stream),
        "parameters": sum(p.numel() for p in model.parameters()),
        "corpus": "Python source of " + first.lstrip("# "),
        "manifest_sha256": hashlib.sha256(manifest.read_bytes()).hexdigest(),
        "machine": {name: where.get(name) for name in ("cpu", "cores", "threads", "gpu", "os", "python")},
        "packages": where.get("packages", {}),
        "earlier": {key: earlier[key] for key in ("name", "tokens", "seconds") if key in earlier} if earlier else None,
    }


def save(model: nn.Module, tokenizer: Any, training: dict[str, Any], folder: Path) -> None:
    """Write weights in bf16, configuration, tokenizer and the training record."""
    model.config._attn_implementation = "sdpa"
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_atomic(folder / "training.json", json.dumps(training, indent=1) + "\n")


def accept_and_card(folder: Path, training: dict[str, Any]) -> Acceptance:
    """Run the acceptance and write the model card that tells its outcome."""
    from transformers import AutoConfig

    found = accept(folder, Evaluation())
    write_card(folder, folder.resolve().name, AutoConfig.from_pretrained(folder), training, found)
    return found
