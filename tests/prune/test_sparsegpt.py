"""SparseGPT against the paper's algorithm in float64, against exact least squares, and against Wanda and magnitude."""

import pytest
import torch

from qlib.compress import compress
from qlib.data.calibration import read_calibration
from qlib.errors import UserError
from qlib.models.families import blocks_of, family_of, linears_of
from qlib.models.load import load
from qlib.params import Calibration
from qlib.prune import sparsegpt, wanda
from qlib.prune.mask import mask_of
from qlib.prune.select import choose_mask
from qlib.prune.structures import output_error
from qlib.quantize import gptq
from qlib.walk import feed_groups, walk

DAMP = 0.01


def case(rows: int = 6, width: int = 32, tokens: int = 80, seed: int = 0):
    """A weight, correlated inputs, and the factor of their Hessian."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator)
    inputs = torch.randn(tokens, width, generator=generator) @ torch.randn(width, width, generator=generator) / 4
    statistic = gptq.Statistic(width, gptq.Options())
    for part in inputs.split(30):
        statistic.feed(part)
    return weight, inputs, statistic


def damped(inputs: torch.Tensor) -> torch.Tensor:
    hessian = inputs.double().t() @ inputs.double()
    return hessian + DAMP * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)


def by_the_paper(weight, hessian, sparsity, pattern=None, block=128):
    """Each removal by the optimal brain surgeon: the inverse of what is left of the Hessian, computed anew each time."""
    weight, mask = weight.double().clone(), torch.ones_like(weight, dtype=torch.bool)
    block = int(pattern.partition(":")[2]) if pattern else block
    width = weight.shape[1]
    for j in range(width):
        if j % block == 0:
            end = min(j + block, width)
            costs = [torch.linalg.inv(hessian[c:, c:])[0, 0] for c in range(j, end)]
            mask[:, j:end] = choose_mask(weight[:, j:end].square() / torch.stack(costs), sparsity, pattern)
        inverse = torch.linalg.inv(hessian[j:, j:])
        gone = torch.where(mask[:, j], 0.0, weight[:, j])
        weight[:, j:] -= gone[:, None] / inverse[0, 0] * inverse[0]
        weight[:, j] = torch.where(mask[:, j], weight[:, j], 0.0)
    return weight, mask


def loss(change: torch.Tensor, hessian: torch.Tensor) -> float:
    change = change.double()
    return float(((change @ hessian) * change).sum())


@pytest.mark.parametrize("sparsity, pattern", [(0.5, None), (0.3, None), (0.8, None), (0.5, "2:4"), (0.5, "4:8"), (0.25, "3:4")])
@pytest.mark.parametrize("width", [32, 152])  # the last block is not full
def test_it_is_the_algorithm_of_the_paper(sparsity, pattern, width):
    weight, inputs, statistic = case(width=width, tokens=3 * width)
    wanted, mask = by_the_paper(weight, damped(inputs), sparsity, pattern)
    found = sparsegpt.prune_columns(weight, statistic.factor(DAMP), sparsity, pattern)
    assert torch.equal(found.mask, mask)
    assert (found.dequantize() - wanted).norm() < 1e-3 * wanted.norm()
    if pattern:
        kept, of = map(int, pattern.split(":"))
        assert (mask.view(len(mask), -1, of).sum(-1) == kept).all()


def test_the_error_lies_between_exact_least_squares_on_the_same_mask_and_zeroing():
    weight, inputs, statistic = case(rows=12, width=48, tokens=200)
    hessian = damped(inputs)
    found = sparsegpt.solve(weight, sparsegpt.Options(), statistic=statistic)
    exact = torch.zeros_like(weight, dtype=torch.float64)
    for row, (w, keep) in enumerate(zip(weight.double(), found.mask)):
        here = keep.nonzero().flatten()
        exact[row, here] = torch.linalg.solve(hessian[here][:, here], hessian[here] @ w)
    best, ours, zeroed = (loss(one - weight, hessian) for one in (exact, found.dequantize(), weight * found.mask))
    assert best <= ours < 2 * best and ours < 0.8 * zeroed  # columns before one that goes cannot make up for it


def test_an_earlier_mask_stays_and_counts_and_dead_inputs_go_first():
    weight, inputs, _ = case(width=64)
    inputs[:, 5] = 0
    statistic = gptq.Statistic(64, gptq.Options())
    statistic.feed(inputs)
    first = torch.rand(weight.shape, generator=torch.Generator().manual_seed(3)) > 0.2
    found = sparsegpt.solve(weight, sparsegpt.Options(), mask=first, statistic=statistic)
    assert not (found.mask & ~first).any() and (~found.mask).sum() == weight.numel() // 2
    assert not found.mask[:, 5].any() and torch.equal(found.dequantize() == 0, ~found.mask)
    before = weight.clone()
    whole = sparsegpt.solve(weight, sparsegpt.Options(sparsity=0.0), statistic=statistic)
    assert torch.equal(weight, before) and whole.mask.all()
    assert torch.equal(whole.dequantize()[:, :5], weight[:, :5])  # but for dead inputs nothing changes


def test_on_every_linear_of_the_reference_model_it_loses_less_than_wanda_and_wanda_less_than_magnitude():
    """All compare what they compare in their papers, magnitude like Wanda within an output."""
    subject, worse = load("reference-2"), []
    ids = read_calibration(subject.tokenizer, Calibration(samples=16), 0)
    for visit in walk(subject.model, ids):
        for names in family_of(subject.config).groups:
            width = visit.block.get_submodule(names[0]).in_features
            hessian, norms = gptq.Statistic(width, gptq.Options()), wanda.Statistic(width, wanda.Options())
            feed_groups(visit.block, visit.inputs, {names: lambda x: (hessian.feed(x), norms.feed(x))})
            factor = hessian.factor(DAMP)
            gram = hessian.hessian.double()
            gram = gram.tril() + gram.tril(-1).t()
            keep = torch.arange(width)
            for name in names:
                weight = visit.block.get_submodule(name).weight.detach().float()
                for recipe in ({"sparsity": 0.5}, {"sparsity": 0.5, "pattern": "2:4"}, {"sparsity": 0.7}):
                    by_size = choose_mask(weight.abs(), recipe["sparsity"], recipe.get("pattern"), by_row=True)
                    results = [
                        sparsegpt.prune_columns(weight, factor, recipe["sparsity"], recipe.get("pattern")).dequantize(),
                        wanda.solve(weight, wanda.Options(**recipe), statistic=norms).dequantize(),
                        weight * by_size,
                    ]
                    errors = [output_error(weight, gram, keep, one) for one in results]
                    if not errors[0] < errors[1] < errors[2]:
                        worse.append((visit.index, name, recipe, errors))
    assert not worse


def test_in_a_recipe(model_folder):
    calibration = Calibration(samples=16, length=64)
    subject = compress(load(str(model_folder())), [{"pass": "sparsegpt", "sparsity": 0.6}], calibration)
    for linear in linears_of(subject.model, blocks_of(subject.model)[0]).values():
        assert abs(mask_of(linear).float().mean() - 0.4) < 0.01
    again = compress(subject, [{"pass": "gptq", "bits": 4, "group_size": 32}], calibration)
    for linear in linears_of(again.model, blocks_of(again.model)[0]).values():
        assert abs(mask_of(linear).float().mean() - 0.4) < 0.06  # some of what is left may round to zero
    with pytest.raises(UserError, match="recipe.0..pattern: '3:6' "):
        compress(load(str(model_folder())), [{"pass": "sparsegpt", "pattern": "3:6"}], calibration)
    with pytest.raises(UserError, match="recipe.0..sparsity: 1.2 is not allowed"):
        compress(load(str(model_folder())), [{"pass": "sparsegpt", "sparsity": 1.2}], calibration)
    with pytest.raises(UserError, match="damp"):
        compress(load(str(model_folder())), [{"pass": "sparsegpt", "damp": -1.0}], calibration)
