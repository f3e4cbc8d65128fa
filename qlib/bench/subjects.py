"""Models of random weights, for timings that do not depend on values."""

from dataclasses import replace
from pathlib import Path

import torch

from qlib.models.load import Source, Subject, load
from qlib.models.shapes import Shape, layer_config

__all__ = ["random_model", "shaped_model", "random_windows", "MEDIUM"]

#: 107 million parameters: what the time of GPTQ is compared on.
MEDIUM = {"layers": 8, "hidden": 1024, "ffn": 2816, "heads": 16, "vocab": 4096}


def random_model(layers: int, hidden: int, ffn: int, heads: int, vocab: int = 4096, seed: int = 0) -> Subject:
    """A Qwen2-architecture model in bf16 with the shipped model's tokenizer."""
    return shaped_model(Shape("random", layers, hidden, heads, heads, ffn, vocab, head_dim=hidden // heads), layers, vocab, seed)


def shaped_model(shape: Shape, layers: int, vocab: int, seed: int = 0) -> Subject:
    """The same with so many layers of a given shape, and a tied vocabulary of another size."""
    from transformers import Qwen2ForCausalLM

    config = layer_config(replace(shape, vocab=vocab, tied=True), layers)
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu").eval().requires_grad_(False)
    model.tie_weights()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
        else:
            parameter.copy_(torch.empty(parameter.shape).normal_(0, 0.02, generator=generator))
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=config)  # its frequencies were on the meta device
    return Subject(model, load("reference").tokenizer, config, Source(shape.name, Path(), None))


def random_windows(samples: int, length: int, vocab: int = 4096, seed: int = 0, rows: int = 16) -> list[torch.Tensor]:
    """Batches of random token ids `[<= rows, length]`."""
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(0, vocab, (samples, length), generator=generator).split(rows))
