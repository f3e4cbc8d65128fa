"""Text token by token with little beside the products themselves: a static cache, and blocks run by a few operators.

A general implementation spends more time on Python around a small model than on reading its weights. This is the same
arithmetic for decoders whose blocks are those of Qwen2 and Llama, whatever their linears are; batch 1.
"""

import torch
import torch.nn.functional as F
from torch import nn

from qlib.errors import UserError
from qlib.layers import native, native_attention, native_blocks
from qlib.layers.graphs import recorded
from qlib.layers.base import PackedLinear
from qlib.models.families import blocks_of, family_of

__all__ = ["Decoder", "Cache", "rotary_tables", "run_block"]

#: Architectures whose blocks `run_block` is true to.
KINDS = ("qwen2", "llama", "mistral")


class Cache:
    """Keys and values of one block, `[kv_heads, tokens, dim]`: room for `tokens` of them."""

    def __init__(self, kv_heads: int, tokens: int, dim: int, like: torch.Tensor) -> None:
        self.keys, self.values = like.new_zeros(2, kv_heads, tokens, dim)


def rotary_tables(rotary: nn.Module, tokens: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines `[tokens, 1, dim]`, the first half of the sines negative: turning a head x is then
    x * cos + (x, its halves exchanged) * sin."""
    cos, sin = rotary(like, torch.arange(tokens, device=like.device)[None])
    sin = torch.cat([-sin[..., : sin.shape[-1] // 2], sin[..., sin.shape[-1] // 2 :]], dim=-1)
    return cos[0, :, None], sin[0, :, None]


def run_block(
    block: nn.Module, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], cache: Cache, start: int | torch.Tensor
) -> torch.Tensor:
    """A decoder block on `x [tokens, hidden]`, of which the cache holds the `start` tokens before.

    Several tokens at once must be the first ones. For a single one, `start` may be a tensor `[1]`, which is not looked at
    from Python. `rotary`: cosines and sines of the tokens, `[tokens, 1, dim]`.
    """
    attention, mlp = block.self_attn, block.mlp
    normed = _norm(block.input_layernorm, x)
    q, k, v = attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed)
    attend = native_attention.attend if len(x) == 1 and _is_short_work(x, cache.keys.shape[-1]) else _attend
    attend = _attend_anywhere if isinstance(start, torch.Tensor) else attend
    x = x + attention.o_proj(attend(q, k, v, rotary, cache.keys, cache.values, start))
    normed = _norm(block.post_attention_layernorm, x)
    return x + mlp.down_proj(F.silu(mlp.gate_proj(normed)).mul_(mlp.up_proj(normed)))


def _is_short_work(x: torch.Tensor, width: int) -> bool:
    """Whether kernels of our own save Python's time around these operators."""
    return x.dtype == torch.bfloat16 and native.takes(x.device, width, 16)


def _norm(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if _is_short_work(x, x.shape[-1]):
        return native_attention.rms_norm(x, norm.weight, norm.variance_epsilon)
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor],
    keys: torch.Tensor, values: torch.Tensor, used: int,
) -> torch.Tensor:  # fmt: skip
    """`native_attention.attend` with torch's operators, for any number of tokens."""
    (kv_heads, _, dim), tokens = keys.shape, len(q)
    both = _turn(torch.cat([q, k], dim=-1).view(tokens, -1, dim), rotary)
    queries, end = both[:, :-kv_heads], used + tokens
    keys[:, used:end] = both[:, -kv_heads:].transpose(0, 1)
    values[:, used:end] = v.view(tokens, kv_heads, dim).transpose(0, 1)
    keys, values = keys[None, :, :end], values[None, :, :end]
    if tokens == 1:  # the query heads that share keys and values, as rows of one product
        mixed = F.scaled_dot_product_attention(queries.reshape(1, kv_heads, -1, dim), keys, values)
    else:
        queries = queries.transpose(0, 1)[None]
        mixed = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True).transpose(1, 2)
    return mixed.reshape(tokens, -1)


def _attend_anywhere(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor],
    keys: torch.Tensor, values: torch.Tensor, used: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """`_attend` of one token whose place only the device knows: all of the cache is read, and what is not used masked."""
    kv_heads, room, dim = keys.shape
    both = _turn(torch.cat([q, k], dim=-1).view(1, -1, dim), rotary)
    keys.index_copy_(1, used, both[:, -kv_heads:].transpose(0, 1))
    values.index_copy_(1, used, v.view(1, kv_heads, dim).transpose(0, 1))
    queries = both[:, :-kv_heads].reshape(1, kv_heads, -1, dim)
    seen = (torch.arange(room, device=used.device) <= used).expand(1, kv_heads, queries.shape[2], room)
    return F.scaled_dot_product_attention(queries, keys[None], values[None], attn_mask=seen).reshape(1, -1)


def _turn(heads: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return torch.addcmul(heads * rotary[0], heads.roll(heads.shape[-1] // 2, -1), rotary[1])


def _row_kernel(linear: nn.Module) -> native_blocks.RowKernel | None:
    """What multiplies one row with a linear inside `native_blocks.Blocks`; adapters have no place there."""
    packed = isinstance(linear, PackedLinear) and linear.adapter_up is None
    return linear.row_kernel() if packed else None


class Decoder:
    """A model with a cache for `tokens` tokens.

    Args:
        model: a causal model of `KINDS`; its linears and its embedding may be packed.

    Raises:
        UserError: another architecture.
    """

    def __init__(self, model: nn.Module, tokens: int) -> None:
        config, family = model.config, family_of(model.config)
        if config.model_type not in KINDS:
            raise UserError(f"model_type: '{config.model_type}' cannot be decoded here; allowed: {', '.join(KINDS)}")
        self.blocks, self.norm = blocks_of(model), model.get_submodule(family.norm)
        self.embedding, self.head = model.get_input_embeddings(), model.get_output_embeddings()
        dim = self.blocks[0].self_attn.head_dim
        self.rotary = rotary_tables(model.model.rotary_emb, tokens, self.norm.weight)
        self.caches = [Cache(config.num_key_value_heads, tokens, dim, self.norm.weight) for _ in self.blocks]
        self.used, self.own, self.graph = 0, self._own_blocks(), None
        self.place, self.id = torch.zeros(2, 1, dtype=torch.long, device=self.norm.weight.device)  # of a token in a graph

    def _own_blocks(self) -> native_blocks.Blocks | None:
        """All blocks as one call, if kernels of our own take every part of them."""
        found, epsilons, widths = [], set(), {len(self.norm.weight)}
        for block, cache in zip(self.blocks, self.caches):
            attention, mlp = block.self_attn, block.mlp
            linears = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
            linears += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
            kernels = [_row_kernel(linear) for linear in linears]
            if None in kernels:
                return None
            norms = [block.input_layernorm, block.post_attention_layernorm]
            epsilons |= {norm.variance_epsilon for norm in norms}
            widths |= {mlp.gate_proj.out_features, cache.keys.shape[-1]}
            biases = [linear.bias for linear in linears]
            found.append((list(zip(kernels, biases)), [norm.weight for norm in norms], [cache.keys, cache.values]))
        short = all(_is_short_work(self.norm.weight, width) for width in widths)
        return native_blocks.Blocks(found, *epsilons) if short and len(epsilons) == 1 else None

    @torch.inference_mode()
    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits `[vocab]` after token ids `[tokens]`, which follow on those of earlier calls.

        Several tokens at once are allowed in the first call only. On a GPU, single tokens replay a graph.
        """
        if ids.is_cuda and len(ids) == 1:
            return self._replay(ids)
        cos, sin = (table[self.used : self.used + len(ids)] for table in self.rotary)
        x = self.embedding(ids)
        if self.own and len(ids) == 1:
            x = self.own(x, (cos, sin), self.used)
        else:
            for block, cache in zip(self.blocks, self.caches):
                x = run_block(block, x, (cos, sin), cache, self.used)
        self.used += len(ids)
        return self.head(_norm(self.norm, x[-1:]))[0]

    def _replay(self, ids: torch.Tensor) -> torch.Tensor:
        self.place.fill_(self.used)
        self.id.copy_(ids)
        self.used += 1
        if self.graph is None:  # recording runs the step: it must be the one that is due
            self.graph = recorded(self._step)
        return self.graph().clone()

    def _step(self) -> torch.Tensor:
        """Logits after the token `id` at `place`, without a look at either."""
        x, rotary = self.embedding(self.id), tuple(table[self.place] for table in self.rotary)
        for block, cache in zip(self.blocks, self.caches):
            x = run_block(block, x, rotary, cache, self.place)
        return self.head(_norm(self.norm, x))[0]

    def rewind(self, tokens: int = 0) -> None:
        """Forget all but the first `tokens` tokens."""
        self.used = tokens
