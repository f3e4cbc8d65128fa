"""Training through rounding: gradients against formulas and finite differences, and the way back to packed codes."""

import pytest
import torch
from torch import nn

from qlib.layers import pack
from qlib.prune.mask import mark_pruned, mask_of
from qlib.quantize.grid import Grid, fit_grid, round_to_grid
from qlib.train.fake_quant import FakeQuantLinear, fake_quantize, pack_again, straight_through, unpack_for_training

GRIDS = [Grid(2, 32), Grid(3, 32), Grid(4, 32), Grid(4, 32, symmetric=True), Grid(8), Grid(6, 64)]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed_linear(grid, masked=False, bias=True):
    linear = nn.Linear(128, 48, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
    linear.weight.copy_(normal(48, 128))
    if masked:
        linear.weight.mul_(normal(48, 128, seed=1) > 0)
    packed = pack(linear, round_to_grid(linear.weight, grid, *fit_grid(linear.weight, grid)))
    if masked:
        mark_pruned(packed)
    return packed


def gradients(steps, scale, zero, levels, upstream):
    """The formulas, one weight at a time, in float64: gradient to each step, and to the scale."""
    to_steps, to_scale = [], 0.0
    for step, g in zip(steps.double().tolist(), upstream.double().tolist()):
        code = round(step) + zero
        to_steps.append(g * scale if 0 <= code <= levels - 1 else 0.0)
        to_scale += g * (min(max(code, 0), levels - 1) - zero)
    return to_steps, to_scale


@pytest.mark.parametrize("levels, zero", [(4, 1), (8, 3), (16, 8)])
def test_gradients_are_those_of_the_formulas(levels, zero):
    steps, upstream = (3 * normal(1, 1, 64)).requires_grad_(), normal(1, 1, 64, seed=1)
    scale = torch.full((1, 1, 1), 0.31, requires_grad=True)
    (fake_quantize(steps, scale, torch.full((1, 1, 1), float(zero)), levels) * upstream).sum().backward()
    to_steps, to_scale = gradients(steps[0, 0], scale.item(), zero, levels, upstream[0, 0])
    assert 0 in to_steps or levels > 8, "some weights are cut"
    torch.testing.assert_close(steps.grad[0, 0].double(), torch.tensor(to_steps, dtype=torch.float64))
    assert scale.grad.item() == pytest.approx(to_scale, rel=1e-4, abs=1e-4)


def test_with_the_weight_given_in_float_the_scale_has_the_gradient_of_lsq():
    """Steps that are weight / scale turn the formulas into those of the paper: round(v) - v, and 1 to the weight."""
    weight, upstream, zero, levels = normal(1, 1, 64).double().requires_grad_(), normal(1, 1, 64, seed=1).double(), 3, 8
    scale = torch.full((1, 1, 1), 0.31, dtype=torch.float64, requires_grad=True)
    (fake_quantize(weight / scale, scale, torch.full((1, 1, 1), float(zero)), levels) * upstream).sum().backward()
    v = (weight / scale).detach()
    code, cut = v.round() + zero, (v.round() + zero).clamp(0, levels - 1)
    inside = code == cut
    assert 0 < inside.sum() < 64
    torch.testing.assert_close(weight.grad, upstream * inside)
    wanted = (upstream * torch.where(inside, v.round() - v, cut - zero)).sum()
    assert scale.grad.item() == pytest.approx(wanted.item())


def test_the_gradient_of_the_scale_is_the_true_derivative():
    steps, upstream = 3 * normal(1, 2, 16).double(), normal(1, 2, 16, seed=1).double()
    zeros, scales = torch.ones(1, 2, 1).double(), torch.full((1, 2, 1), 0.3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda scale: (fake_quantize(steps, scale, zeros, 4) * upstream).sum(), scales)


def test_straight_through_returns_the_rounded_value_and_the_gradient_of_the_exact_one():
    exact = normal(1000).requires_grad_()
    rounded = straight_through(exact, exact.round())
    (3 * rounded).sum().backward()
    assert torch.equal(rounded, exact.round()) and torch.equal(exact.grad, torch.full_like(exact, 3.0))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_unpacking_and_packing_again_changes_nothing(grid, masked):
    before = packed_linear(grid, masked)
    model = nn.Sequential(before)
    unpack_for_training(model)
    assert isinstance(model[0], FakeQuantLinear)
    torch.testing.assert_close(model[0].quantized(), before.compressed().dequantize(), rtol=0, atol=0)
    pack_again(model)
    assert type(model[0]) is type(before) and model[0].resident_bytes() == before.resident_bytes()
    assert torch.equal(model[0].compressed().dequantize(), before.compressed().dequantize())
    assert (mask_of(model[0]) is None) == (not masked) and model[0].bias is before.bias


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_after_training_the_packed_layer_is_what_training_computed_with(grid, masked):
    model = nn.Sequential(packed_linear(grid, masked))
    mask, inputs, wanted = mask_of(model[0]), normal(64, 128, seed=2), normal(64, 48, seed=3)
    unpack_for_training(model)
    model.float().requires_grad_(True)
    codes = model[0].compressed().codes
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(30):
        losses.append(nn.functional.mse_loss(model(inputs), wanted))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    seen, outputs = model[0].quantized().detach(), model(inputs)
    assert losses[-1] < losses[0] and (model[0].compressed().codes != codes).any()
    pack_again(model)
    assert torch.equal(model[0].compressed().dequantize(), seen)
    torch.testing.assert_close(model(inputs), outputs)
    if masked:
        assert not seen[~mask].any()


def test_the_gradient_reaches_weights_scales_and_bias_and_no_scale_turns_negative():
    model = nn.Sequential(packed_linear(Grid(3, 32)))
    unpack_for_training(model)
    model.float().requires_grad_(True)
    model(normal(8, 128)).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    with torch.no_grad():
        model[0].log_scales -= 2
    assert (model[0].scales() > 0).all() and torch.equal(model[0].scales(), model[0].scales().bfloat16().float())


def test_a_range_that_was_turned_round_stays_so():
    grid, weight = Grid(2, 32, symmetric=True), torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    scales, zeros, _ = fit_grid(weight, grid)
    compressed = round_to_grid(weight, grid, -scales, zeros)
    layer = FakeQuantLinear(pack(torch.nn.Linear(64, 8, bias=False), compressed))
    torch.testing.assert_close(layer.quantized(), compressed.dequantize(), rtol=0, atol=0)
