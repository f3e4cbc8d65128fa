"""Functions of the vector library are called by one thread before models are computed with."""

import torch
from transformers import Qwen2Config

from qlib.models import vector_math
from qlib.models.load import empty_model


def test_what_is_loaded_begins_with_it(monkeypatch):
    called = []
    for name in vector_math.FUNCTIONS:
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda x, name=name, original=original: called.append((name, x.numel())) or original(x))
    vector_math.call_once.cache_clear()
    config = Qwen2Config(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
    empty_model(config)
    assert called[: len(vector_math.FUNCTIONS)] == [(name, 1) for name in vector_math.FUNCTIONS]
    before = len(called)
    vector_math.call_once()
    assert len(called) == before  # once in a process
