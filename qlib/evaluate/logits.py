"""Logits of a Hugging Face model as the scorer asks for them; a context runs once for all texts that go on from it."""

import torch
from torch import nn

from qlib.models.families import FAMILIES, family_of

__all__ = ["ModelLogits", "branch_mask", "branch_positions"]


class ModelLogits:
    """A causal language model as a function of token ids."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, ids: torch.Tensor, keep: int) -> torch.Tensor:
        """Logits of the last `keep` positions of `ids [rows, tokens]`: `[rows, keep, vocabulary]`."""
        return self._run(ids, logits_to_keep=keep)

    def branches(self, contexts: torch.Tensor, options: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Run ``[context, option 1, ..., option n]`` as one sequence in which no option sees another.

        Args:
            contexts: `[rows, c]`. options: `[rows, n, t]`.

        Returns:
            logits that predict the first token of every option `[rows, vocabulary]`, and the tokens behind it
            `[rows, n, t - 1, vocabulary]`. None if this model cannot be given a mask of one's own.
        """
        (rows, context), (_, count, length) = contexts.shape, options.shape
        if not self._takes_mask(context + length):
            return None
        body = options[..., :-1]  # what an option's last token says is not asked for
        ids = torch.cat([contexts, body.flatten(1)], dim=1)
        mask = branch_mask(context, count, length - 1).to(self.model.device)
        dtype = self.model.get_submodule(family_of(self.model.config).norm).weight.dtype  # the type it computes in
        logits = self._run(
            ids,
            attention_mask=torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)[None, None],
            position_ids=branch_positions(context, count, length - 1)[None].to(self.model.device),
            logits_to_keep=ids.shape[1] - context + 1,
        )
        return logits[:, 0], logits[:, 1:].unflatten(1, (count, length - 1))

    def _run(self, ids: torch.Tensor, **options) -> torch.Tensor:
        """Logits; where keys and values are stored in few bits, what is seen of them has been through a cache."""
        if getattr(self.model.config, "kv_cache", None):
            from qlib.layers.kv_cache import make_cache

            options["past_key_values"] = make_cache(self.model)
        cached = "past_key_values" in options
        return self.model(input_ids=ids.to(self.model.device), use_cache=cached, **options).logits

    def _takes_mask(self, tokens: int) -> bool:
        """Whether a mask replaces the model's own: not where a sliding window, which it would lift, matters."""
        config = self.model.config
        window = getattr(config, "sliding_window", None)
        return (
            config.model_type in FAMILIES
            and config._attn_implementation in ("sdpa", "eager")
            and (window is None or window >= tokens)
        )


def branch_mask(context: int, count: int, length: int) -> torch.Tensor:
    """Which token sees which: the context and itself, in order; bool `[tokens, tokens]`, rows are what looks."""
    branch = torch.cat([torch.zeros(context, dtype=torch.long), 1 + torch.arange(count).repeat_interleave(length)])
    same = (branch[:, None] == branch) | (branch == 0)
    return same & torch.ones_like(same).tril()


def branch_positions(context: int, count: int, length: int) -> torch.Tensor:
    """The position of every token in the text it belongs to `[tokens]`: each branch goes on where the context ends."""
    return torch.cat([torch.arange(context), torch.arange(context, context + length).repeat(count)])
