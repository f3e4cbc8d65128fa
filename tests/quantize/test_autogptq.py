"""Our GPTQ and auto-gptq's: on equal settings they are the same method, so their codes must be the same.

They get there by other factors: theirs is of the inverse Hessian, ours of the Hessian.
"""

import os
import sys

import pytest
import torch

from qlib.errors import UserError
from qlib.quantize import autogptq, gptq
from test_gptq import draw, output_error


def both(weight, inputs, block_size=128, **settings):
    """What our solver and auto-gptq's make of a weight, each with a statistic fed in two unequal parts."""
    solved = []
    for module, options in (
        (gptq, gptq.Options(**settings)),
        (autogptq, autogptq.Options(block_size=block_size, **settings)),
    ):
        statistic = module.Statistic(weight.shape[1], options)
        for part in inputs.split(len(inputs) * 2 // 3):
            statistic.feed(part)
        solved.append(module.solve(weight, options, None, statistic))
    return solved


def assert_same(ours, theirs, weight, inputs, act_order=False):
    """The same codes in all rows, but for those where fp32 cannot tell which of two codes is nearer.

    Both compute in fp32, in another order, and from there on such a row takes another course. So the first difference
    of a row must stand where in float64 a weight lies halfway between two codes. Returns the number of such rows.
    """
    exact = inputs.double().T @ inputs.double()
    order = exact.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(len(exact))
    hessian = (exact + 0.01 * exact.diagonal().mean() * torch.eye(len(exact)))[order][:, order]
    errors = (weight.double() - theirs.dequantize())[:, order]
    size = weight.shape[1] // theirs.scales.shape[1]
    scales = theirs.scales.double().repeat_interleave(size, 1)[:, order]
    differing = (ours.codes != theirs.codes)[:, order]
    rows = differing.any(1).nonzero()[:, 0].tolist()
    for row in rows:
        at = int(differing[row].nonzero()[0])
        # What the columns before ask of those from here on: the least e H e^T with their errors as they are.
        asked = -torch.linalg.solve(hessian[at:, at:], hessian[at:, :at] @ errors[row, :at])[0]
        steps = (weight[row, order[at]].double() - asked) / scales[row, at]
        fits = torch.equal(ours.scales[row], theirs.scales[row])
        assert not fits or abs((steps - steps.floor()).item() - 0.5) < 1e-3, f"row {row} differs from column {at} on"
    return len(rows)


@pytest.mark.parametrize("bits", (4, 3))
@pytest.mark.parametrize("size", (None, 128, 64, 32))
@pytest.mark.parametrize("symmetric", (False, True))
@pytest.mark.parametrize("act_order", (False, True))
def test_codes_coincide_on_random_matrices(bits, size, symmetric, act_order):
    for seed, (rows, columns) in enumerate(((48, 128), (64, 384))):
        weight, inputs = (drawn.bfloat16() for drawn in draw(rows, columns, 500, seed))
        settings = {"bits": bits, "group_size": size, "symmetric": symmetric, "act_order": act_order}
        solved = both(weight, inputs, block_size=size or 128, **settings)
        assert assert_same(*solved, weight, inputs, act_order) <= 1


@pytest.mark.parametrize("bits", (4, 3))
def test_codes_coincide_on_every_linear_of_the_reference_model(reference_linears, bits):
    differing = sum(assert_same(*both(weight, x, bits=bits), weight, x) for _, weight, x in reference_linears)
    assert differing <= 10  # of 9,984


@pytest.mark.parametrize("size, symmetric", ((128, True), (None, False), (None, True), (32, False)))
def test_codes_coincide_on_real_layers_with_other_grids(reference_linears, size, symmetric):
    for _, weight, inputs in reference_linears[::5]:
        settings = {"bits": 3, "group_size": size, "symmetric": symmetric}
        solved = both(weight, inputs, block_size=size or 128, **settings)
        assert assert_same(*solved, weight, inputs) <= 2


def test_inside_a_block_theirs_fits_groups_to_weights_that_are_out_of_date():
    """The one difference: groups that begin inside a block. Theirs are fitted to the weights of the block's begin."""
    weight, inputs = draw(64, 256, 600)
    ours, theirs = both(weight, inputs, bits=3, group_size=32, block_size=128)
    assert torch.equal(ours.codes[:, :32], theirs.codes[:, :32]) and torch.equal(ours.scales[:, 0], theirs.scales[:, 0])
    assert not torch.equal(ours.scales[:, 1], theirs.scales[:, 1])
    assert output_error(ours, weight, inputs) < output_error(theirs, weight, inputs)


def test_nothing_is_left_changed():
    weight, inputs = draw()
    state, before, synchronize = torch.get_rng_state(), set(sys.modules), torch.cuda.synchronize
    precision = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    given = weight.clone()
    os.environ["DEBUG"] = "1"
    try:
        autogptq._package.cache_clear()
        first, second = both(weight, inputs, group_size=32)[1], both(weight, inputs, group_size=32)[1]
        assert os.environ["DEBUG"] == "1"
    finally:
        del os.environ["DEBUG"]
    assert torch.equal(first.codes, second.codes) and torch.equal(weight, given)
    assert torch.equal(torch.get_rng_state(), state) and torch.cuda.synchronize is synchronize
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == precision
    assert not [name for name in set(sys.modules) - before if name.startswith("auto_gptq")]


def test_several_linears_share_a_statistic():
    weight, inputs = draw(24)
    statistic = autogptq.Statistic(64, autogptq.Options())
    statistic.feed(inputs)
    options = autogptq.Options(group_size=32)
    whole = autogptq.solve(weight, options, None, statistic)
    parts = [autogptq.solve(part, options, None, statistic) for part in weight.split(12)]
    assert torch.equal(torch.cat([part.codes for part in parts]), whole.codes)
    statistic.free()
    assert statistic.solver is None


def test_a_mask_is_kept():
    weight, inputs = draw()
    mask = weight.abs() > 0.7
    statistic = autogptq.Statistic(64, autogptq.Options())
    statistic.feed(inputs)
    solved = autogptq.solve(weight * mask, autogptq.Options(group_size=32), mask, statistic)
    assert solved.dequantize()[~mask].abs().max() == 0 and solved.dequantize()[mask].abs().max() > 0


def test_what_cannot_work_is_said(monkeypatch):
    weight, inputs = draw(tokens=5)
    for statistic in (None, autogptq.Statistic(64, autogptq.Options())):
        with pytest.raises(UserError, match="calibration: no text reached"):
            autogptq.solve(weight, autogptq.Options(), statistic=statistic)
    statistic = autogptq.Statistic(64, autogptq.Options())
    statistic.feed(inputs)
    statistic.solver.H -= torch.eye(64)
    with pytest.raises(UserError, match="damp: 0.01 leaves the Hessian of 64 inputs singular"):
        autogptq.solve(weight, autogptq.Options(group_size=32), None, statistic)
    autogptq._package.cache_clear()
    monkeypatch.setattr(autogptq, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pass: 'autogptq' needs the package auto-gptq"):
        autogptq.check(None, autogptq.Options())
