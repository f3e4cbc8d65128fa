"""Joint pruning and rounding against the paper's algorithm in float64, against one after the other, and on disk."""

import pytest
import torch
from test_sparsegpt import DAMP, case, damped, loss

from qlib.compress import compress
from qlib.errors import UserError
from qlib.models.families import blocks_of, linears_of
from qlib.models.load import load
from qlib.params import Calibration
from qlib.prune import joint, sparsegpt
from qlib.prune.mask import mask_of
from qlib.prune.select import choose_mask
from qlib.quantize import gptq
from qlib.quantize.formats import Grid
from qlib.quantize.grid import fit_grid, nearest_codes


def by_the_paper(weight, hessian, grid, sparsity, pattern=None, block=128):
    """Optimal brain surgeon column by column: a weight goes or is rounded, and those to its right make up for either."""
    weight, result, mask = weight.double().clone(), torch.zeros_like(weight), torch.ones_like(weight, dtype=torch.bool)
    width, size = weight.shape[1], weight.shape[1] // grid.groups(weight.shape[1])
    block = int(pattern.partition(":")[2]) if pattern else block
    for j in range(width):
        if j % block == 0:
            end = min(j + (max(block, size) if j % size == 0 else block), width)  # of a group all, for its scale
            costs = [torch.linalg.inv(hessian[c:, c:])[0, 0] for c in range(j, end)]
            mask[:, j:end] = choose_mask(weight[:, j:end].square() / torch.stack(costs), sparsity, pattern)
        if j % size == 0:
            part = pruned_alone(weight, hessian, mask, j, j + size)  # what is to be rounded, as pruning leaves it
            scales, zeros, _ = fit_grid(part.float(), Grid(grid.bits, None, grid.symmetric))
        inverse = torch.linalg.inv(hessian[j:, j:])
        codes = nearest_codes(weight[:, j].float(), grid, scales[:, 0].float(), zeros[:, 0].float())
        result[:, j] = torch.where(mask[:, j], (codes.float() - zeros[:, 0].float()) * scales[:, 0].float(), 0)
        weight[:, j:] -= ((weight[:, j] - result[:, j]) / inverse[0, 0])[:, None] * inverse[0]
    return result, mask


def pruned_alone(weight, hessian, mask, first, last):
    """Columns `first` to `last` after those that go went, and nothing was rounded."""
    weight = weight.clone()
    for j in range(first, last):
        inverse = torch.linalg.inv(hessian[j:, j:])
        gone = torch.where(mask[:, j], 0, weight[:, j])
        weight[:, j:] -= (gone / inverse[0, 0])[:, None] * inverse[0]
        weight[:, j] = torch.where(mask[:, j], weight[:, j], 0)
    return weight[:, first:last]


@pytest.mark.parametrize("sparsity, pattern", [(0.5, None), (0.3, None), (0.5, "2:4"), (0.5, "4:8")])
@pytest.mark.parametrize("grid", [Grid(4, 32), Grid(3, 16, symmetric=True), Grid(8, 32)], ids=lambda grid: grid.name)
@pytest.mark.parametrize("width, rows", [(32, 48), (160, 48)])
def test_it_is_the_algorithm_of_the_paper(sparsity, pattern, grid, width, rows):
    weight, inputs, statistic = case(rows=rows, width=width, tokens=3 * width)
    wanted, mask = by_the_paper(weight, damped(inputs), grid, sparsity, pattern)
    found = gptq.solve_columns(
        weight,
        statistic.factor(DAMP),
        grid,
        choose=lambda matters, here: choose_mask(matters, sparsity, pattern),
        together=int(pattern.partition(":")[2]) if pattern else gptq.BLOCK,
    )
    same = ((found.dequantize() - wanted).abs() < 1e-4).all(1)
    assert same.float().mean() > 0.85  # where fp32 and fp64 round one weight differently, the rest of its row differs
    assert (found.mask == mask).float().mean() > 0.99
    assert (found.dequantize()[~found.mask] == 0).all()


@pytest.mark.parametrize("bits, sparsity", [(4, 0.5), (3, 0.5), (2, 0.5)])
def test_one_solve_loses_less_than_two(bits, sparsity):
    better = 0
    for seed in range(8):
        weight, inputs, statistic = case(rows=32, width=256, tokens=600, seed=seed)
        hessian = damped(inputs)
        options = joint.Options(bits=bits, sparsity=sparsity)
        one = joint.solve(weight, options, statistic=statistic)
        pruned = sparsegpt.solve(weight, sparsegpt.Options(sparsity=sparsity), statistic=statistic)
        two = gptq.solve(pruned.dequantize(), gptq.Options(bits=bits), pruned.mask, statistic)
        better += loss(one.dequantize() - weight, hessian) < loss(two.dequantize() - weight, hessian)
        assert abs(one.mask.float().mean() - (1 - sparsity)) < 0.01
    assert better >= 7


def test_where_all_columns_are_compared_at_once_it_is_pruning_and_then_rounding():
    """The mask is the same then, and a column that is rounded asks for the same whichever error came first."""
    weight, _, statistic = case(rows=64, width=128, tokens=400)
    one = joint.solve(weight, joint.Options(group_size=128), statistic=statistic)
    pruned = sparsegpt.solve(weight, sparsegpt.Options(), statistic=statistic)
    two = gptq.solve(pruned.dequantize(), gptq.Options(group_size=128), pruned.mask, statistic)
    assert torch.equal(one.mask, pruned.mask)
    assert (one.codes == two.codes).all(1).float().mean() > 0.9  # a tie in one column moves what is right of it


def test_without_sparsity_it_is_gptq_and_an_earlier_mask_stays():
    weight, _, statistic = case(rows=16, width=256, tokens=600)
    plain = gptq.solve(weight, gptq.Options(), statistic=statistic)
    assert torch.equal(joint.solve(weight, joint.Options(sparsity=0.0), statistic=statistic).codes, plain.codes)
    first = torch.rand(weight.shape, generator=torch.Generator().manual_seed(3)) > 0.2
    found = joint.solve(weight, joint.Options(), first, statistic)
    assert not (found.mask & ~first).any() and (~found.mask).sum() == weight.numel() // 2


def test_in_a_recipe(model_folder):
    calibration = Calibration(samples=16, length=64)
    recipe = [{"pass": "joint", "bits": 4, "group_size": 32, "sparsity": 0.5}]
    subject = compress(load(str(model_folder())), recipe, calibration)
    for linear in linears_of(subject.model, blocks_of(subject.model)[0]).values():
        assert linear.grid == Grid(4, 32) and 0.4 < mask_of(linear).float().mean() <= 0.5
    assert 0.4 < subject.details["kept"]["weights"] <= 0.5 and subject.details["shape_format"] == "int4-g32"
    again = compress(load(str(model_folder())), recipe, calibration)
    for ours, theirs in zip(subject.model.buffers(), again.model.buffers()):
        assert torch.equal(ours, theirs)
    planned = [{"pass": "allocate_sparsity", "by": "magnitude"}, recipe[0]]
    spread = compress(load(str(model_folder())), planned, calibration).details["layers"]
    assert len({round(layer["kept"], 3) for layer in spread}) > 3
    for wrong, reason in [
        ({"pattern": "3:6"}, "pattern: '3:6' "),
        ({"sparsity": 1.0}, "sparsity: 1.0 is not allowed"),
        ({"damp": -1.0}, "damp: -1.0"),
        ({"element": "fp8"}, "bits: 4 is not allowed with element fp8"),
    ]:
        with pytest.raises(UserError, match=f"recipe.0.*{reason}"):
            compress(load(str(model_folder())), [recipe[0] | wrong], calibration)
    with pytest.raises(UserError, match="each put the weights on a grid"):
        compress(load(str(model_folder())), [*recipe, {"pass": "gptq"}], calibration)
