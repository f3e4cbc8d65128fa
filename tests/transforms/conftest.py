"""Tiny fp32 models with numbers that a transformation can go wrong on, and block passes without a grid behind them."""

import pytest
import torch

from qlib.models.families import blocks_of, family_of
from qlib.models.load import Subject
from qlib.recipe import BlockContext
from qlib.walk import walk


@pytest.fixture
def subject(tiny_model):
    """Make a subject: ``subject("qwen2", tied=True)``; norms far from 1, biases far from 0, a channel of outliers."""

    def make(kind="qwen2", tied=False, **changes):
        model = tiny_model(kind, tied, **changes).float()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
                    parameter[..., 3] *= 8
                if name.endswith("bias"):
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
        return Subject(model, None, model.config, None)

    return make


@pytest.fixture(scope="session")
def ids():
    return [torch.randint(0, 300, (4, 32), generator=torch.Generator().manual_seed(7)) for _ in range(2)]


@pytest.fixture
def transform(ids):
    """Apply a block pass to every block: ``transform(subject, awq, options, rounding)``, as of a later pass."""

    def apply(subject, module, options, rounding=None):
        groups = family_of(subject.config).groups
        chosen = {name: rounding for names in groups for name in names}
        for visit in walk(subject.model, ids):
            told = (visit.index, visit.path, groups, visit.inputs, None, chosen, subject.config)
            module.apply(visit.block, options, BlockContext(*told))

    return apply


@pytest.fixture
def logits(ids):
    @torch.no_grad()
    def of(subject):
        return torch.cat([subject.model(batch, use_cache=False).logits for batch in ids])

    return of


@pytest.fixture
def linears():
    def of(subject):
        groups = family_of(subject.config).groups
        return [(block, names) for block in blocks_of(subject.model) for names in groups]

    return of
