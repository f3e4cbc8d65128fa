"""Models of random weights, for timings that do not depend on values."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from qlib.models.load import Source, Subject, empty_model, load
from qlib.models.shapes import Shape, layer_config
from qlib.stream.files import write_json, write_tensors

__all__ = ["random_model", "shaped_model", "random_windows", "write_random_checkpoint", "MEDIUM"]

PIECE = 2**22  # random numbers at a time

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


def write_random_checkpoint(folder: Path, shape: Shape, layers: int, vocab: int = 4096, seed: int = 0) -> None:
    """A checkpoint of random weights in `folder`: a shard for each layer, written a piece at a time, and one for the rest."""
    config = layer_config(replace(shape, vocab=vocab, tied=True), layers)
    shapes = {name: tuple(one.shape) for name, one in empty_model(config).named_parameters()}
    generator, where = torch.Generator().manual_seed(seed), {}
    folder.mkdir(parents=True)
    for index in (*range(layers), None):
        own = [name for name in shapes if name.startswith(f"model.layers.{index}.")]
        names = own if index is not None else [name for name in shapes if name not in where]
        file = folder / (f"layer-{index}.safetensors" if index is not None else "rest.safetensors")
        layout = {name: (torch.bfloat16, shapes[name]) for name in names}
        write_tensors(file, folder, layout, (piece for name in names for piece in _pieces(name, shapes[name], generator)))
        where |= {name: file.name for name in names}
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": where}, folder)
    (folder / "config.json").write_text(json.dumps({**config.to_diff_dict(), "architectures": ["Qwen2ForCausalLM"]}))
    load("reference").tokenizer.save_pretrained(folder)


def _pieces(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Iterator[torch.Tensor]:
    """The numbers of a tensor, at most `PIECE` at a time."""
    left = math.prod(shape)
    while left:
        piece = torch.empty(min(left, PIECE))
        left -= len(piece)
        yield (piece.fill_(1) if name.endswith("norm.weight") else piece.normal_(0, 0.02, generator=generator)).bfloat16()
