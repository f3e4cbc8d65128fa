"""A model in a tool's own kernels: scored through them, and timed in them."""

import copy
from types import SimpleNamespace
from typing import Protocol

import torch
from torch import nn

__all__ = ["ModuleRuntime", "Runtime", "RuntimeModel"]


class Runtime(Protocol):
    """One sequence at a time goes through `prefill` and `decode`; scoring knows of no cache."""

    def __call__(self, ids: torch.Tensor, keep: int) -> torch.Tensor:
        """Logits of the last `keep` positions of `ids [rows, tokens]`: fp32 `[rows, keep, vocabulary]`."""

    def prefill(self, ids: torch.Tensor) -> None:
        """Forget what was cached, and compute `ids [tokens]` into the cache, with the last one's logits."""

    def decode(self, ids: torch.Tensor) -> None:
        """Compute `ids [1]` behind what is cached, which grows by it, with its logits."""


class ModuleRuntime:
    """A Hugging Face model in whose linears a tool has put its own."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.cache = model.eval(), None

    @torch.inference_mode()
    def __call__(self, ids: torch.Tensor, keep: int) -> torch.Tensor:
        return self.model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits.float()

    @torch.inference_mode()
    def prefill(self, ids: torch.Tensor) -> None:
        self.cache = self.model(input_ids=ids[None], use_cache=True, logits_to_keep=1).past_key_values

    @torch.inference_mode()
    def decode(self, ids: torch.Tensor) -> None:
        found = self.model(input_ids=ids[None], use_cache=True, past_key_values=self.cache, logits_to_keep=1)
        self.cache = found.past_key_values


class RuntimeModel(nn.Module):
    """A runtime in the place of a subject's model, so that `qlib.evaluate` asks it as any other.

    The uncompressed modules stay inside, so that what asks for blocks and their linears finds them; none of them runs.
    """

    def __init__(self, runtime: Runtime, model: nn.Module) -> None:
        super().__init__()
        self.runtime, self.config = runtime, copy.deepcopy(model.config)
        self.config._attn_implementation = "its own"  # takes no mask from elsewhere
        for name, child in model.named_children():
            self.add_module(name, child)
        self.get_input_embeddings, self.get_output_embeddings = model.get_input_embeddings, model.get_output_embeddings

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def forward(self, input_ids: torch.Tensor, logits_to_keep: int, use_cache: bool = False) -> SimpleNamespace:
        return SimpleNamespace(logits=self.runtime(input_ids, logits_to_keep))
