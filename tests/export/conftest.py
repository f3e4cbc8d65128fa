"""Tiny models with packed layers of any format."""

from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def quantized(tiny_model, tokenizer):
    """Make a subject: ``quantized(Grid(4, 64), tied=True)``, or with a function from a linear's name to a grid."""
    from qlib.layers import pack
    from qlib.models.families import blocks_of, linears_of
    from qlib.models.load import Source, Subject
    from qlib.quantize.grid import fit_grid, round_to_grid

    def make(grid, tied=False, **changes):
        size = dict(hidden_size=128, head_dim=32, intermediate_size=256, initializer_range=0.2)
        size["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e3}  # what no program takes by itself
        model = tiny_model("qwen2", tied, **(size | changes)).requires_grad_(False)
        for name, parameter in model.named_parameters():  # fresh ones are 0 and 1, which would hide mistakes
            if parameter.ndim == 1:
                low, high = (0.5, 1.5) if "norm" in name else (-0.5, 0.5)
                parameter.copy_(torch.linspace(low, high, len(parameter)))
        for block in blocks_of(model):
            for name, linear in linears_of(model, block).items():
                if (own := grid(name) if callable(grid) else grid) is not None:
                    parent, _, leaf = name.rpartition(".")
                    fit = fit_grid(linear.weight, own)
                    setattr(block.get_submodule(parent), leaf, pack(linear, round_to_grid(linear.weight, own, *fit)))
        return Subject(model, tokenizer, model.config, Source("tiny", Path(), None))

    return make
