"""An int8 embedding looks up what its codes mean, and shares them with the head."""

import copy

import torch
import torch.nn.functional as F

from qlib.layers.embedding import PackedEmbedding, tied_head
from qlib.quantize.grid import Grid, fit_grid, round_to_grid

GRID = Grid(8, symmetric=True)


def make(vocab: int = 100, hidden: int = 64):
    weight = torch.randn(vocab, hidden, generator=torch.Generator().manual_seed(0))
    return round_to_grid(weight, GRID, *fit_grid(weight, GRID))


def test_rows_are_those_of_the_dequantized_weight():
    compressed, ids = make(), torch.tensor([[3, 99, 0], [3, 7, 7]])
    embedding, wanted = PackedEmbedding(compressed), F.embedding(ids, compressed.dequantize())
    assert torch.equal(embedding(ids), wanted.bfloat16())
    exact = copy.deepcopy(embedding).float()  # a model in fp32 sees every bit
    assert exact(ids).dtype == torch.float32 and torch.equal(exact(ids), wanted)
    for name in ("codes", "scales", "zeros"):
        assert torch.equal(getattr(exact.compressed(), name), getattr(compressed, name))


def test_the_state_comes_back():
    embedding, other = PackedEmbedding(make()), PackedEmbedding(make())
    other.codes.zero_()
    other.load_state_dict(embedding.state_dict())
    assert torch.equal(other(torch.arange(100)), embedding(torch.arange(100)))


def test_a_tied_head_multiplies_with_the_same_memory():
    compressed = make()
    embedding = PackedEmbedding(compressed)
    head, x = tied_head(embedding), torch.randn(2, 3, 64)
    for name in ("codes", "scale_bits"):
        assert getattr(head, name).data_ptr() == getattr(embedding, name).data_ptr()
    assert torch.equal(head(x), F.linear(x, compressed.dequantize()))
    wanted = F.linear(x.bfloat16().double(), compressed.dequantize().double())
    assert torch.allclose(head(x.bfloat16()).double(), wanted, rtol=2**-7, atol=2**-7)
