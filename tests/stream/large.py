"""Random Qwen2 checkpoints of any size, written shard by shard, never whole in memory; a limit on the memory of a child."""

import json
import os
import resource
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import torch
from safetensors.torch import save_file
from transformers import Qwen2Config

from qlib.models.families import blocks_of
from qlib.models.load import empty_model

__all__ = ["write_model", "memory_limit"]

INDEX = "model.safetensors.index.json"


def write_model(folder, tokenizer, blocks, shards=None, **shape):
    """Write a checkpoint: a shard for each block and one each for embedding, norm and head; returns bytes of them all.

    Args:
        shards: folder with those of a deeper model of the same shape, which are linked instead.
    """
    folder.mkdir()
    config = Qwen2Config(num_hidden_layers=blocks, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False, **shape)
    config.architectures = ["Qwen2ForCausalLM"]
    model, where = empty_model(config), {}
    parts = {f"block-{index}": (f"model.layers.{index}.", block) for index, block in enumerate(blocks_of(model))}
    parts |= {"embedding": ("model.embed_tokens.", model.model.embed_tokens), "norm": ("model.norm.", model.model.norm)}
    parts |= {"head": ("lm_head.", model.lm_head)}
    for seed, (part, (prefix, module)) in enumerate(parts.items()):
        names, file = [name for name, _ in module.named_parameters()], folder / f"{part}.safetensors"
        where |= {f"{prefix}{name}": file.name for name in names}
        if shards is None:
            draw = torch.Generator().manual_seed(seed)
            tensors = {name: _random(name, one.shape, draw) for name, one in module.named_parameters()}
            save_file({f"{prefix}{name}": tensor for name, tensor in tensors.items()}, file, {"format": "pt"})
        else:
            os.link(shards / file.name, file)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _random(name, shape, generator):
    """Weights so small that hidden states stay in range through many blocks; norms are 1."""
    tensor = torch.empty(shape, dtype=torch.bfloat16)
    return tensor.fill_(1) if "norm" in name else tensor.uniform_(-0.03, 0.03, generator=generator)


@contextmanager
def memory_limit(size):
    """What a command is prefixed with to run in at most `size` bytes, and what does it; (None, why) where nothing can.

    A control group, version 1 or 2, if one can be made: it counts all memory, page cache too, which is reclaimed. Else the
    limit of the process on private memory that may be written, used or not.
    """
    group, file = _make_group(size)
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    if group:
        try:
            yield ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"], f"control group, {file}"
        finally:
            group.rmdir()
    elif hard == resource.RLIM_INFINITY or hard >= size:
        yield ["sh", "-c", f'ulimit -d {size // 1024} && exec "$@"', "sh"], "RLIMIT_DATA"
    else:
        yield None, f"no control group can be made, and RLIMIT_DATA is {hard} already"


def _make_group(size):
    """Folder of a new control group and the file of its limit; None, None where none can be made."""
    for root, file in ((Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"), (Path("/sys/fs/cgroup"), "memory.max")):
        group = root / f"qlib-{uuid4().hex[:12]}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / file).write_text(str(size))
            return group, file
        except OSError:
            group.rmdir()
    return None, None
