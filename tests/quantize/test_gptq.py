"""GPTQ against the update it is derived from, in float64 with the full inverse Hessian, and on real layers."""

import numpy as np
import pytest
import torch

from qlib.compress import compress
from qlib.errors import UserError
from qlib.layers import packed_layers
from qlib.models.families import blocks_of, linears_of
from qlib.models.load import load
from qlib.params import Calibration
from qlib.prune.mask import PrunedWeight, mask_of, put_pruned
from qlib.quantize import gptq, rtn

GRIDS = [(bits, size, symmetric) for bits in (4, 3, 2) for size in (None, 32) for symmetric in (False, True)]


def draw(rows=12, columns=64, tokens=256, seed=0):
    """A weight and correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=generator)
    inputs = torch.randn(tokens, columns, generator=generator) @ mix
    return torch.randn(rows, columns, generator=generator), inputs


def fed(inputs, options):
    statistic = gptq.Statistic(inputs.shape[1], options)
    statistic.feed(inputs)
    return statistic


def solve(weight, inputs, mask=None, **settings):
    options = gptq.Options(**settings)
    return gptq.solve(weight, options, mask, fed(inputs, options))


def output_error(compressed, weight, inputs):
    """||X W^T - X Q^T|| in float64."""
    return (inputs.double() @ (compressed.dequantize() - weight.float()).double().T).norm().item()


def fit(group, bits, symmetric):
    """Scale (bf16) and zero of each row of a group, from the definition."""
    low, high = np.minimum(group.min(1), 0), np.maximum(group.max(1), 0)
    if symmetric:
        high = np.maximum(-low, high)
        low = -high
    scale = torch.tensor((high - low) / (2**bits - 1)).bfloat16().double().numpy()
    return scale, np.full(len(group), 2 ** (bits - 1)) if symmetric else np.round(-low / scale)


def brute_force(weight, inputs, bits, size, symmetric, damp=0.01, mask=None, act_order=False):
    """Optimal brain quantization in a fixed order: after each column the others move by its error times its row of the
    inverse Hessian, and the column is eliminated from that inverse. No factorization, no blocks, float64."""
    left, x = weight.double().numpy().copy(), inputs.double().numpy()
    kept = np.ones(left.shape, bool) if mask is None else mask.numpy()
    size = size or left.shape[1]
    hessian = 2 * x.T @ x / len(x)
    order = np.argsort(-np.diag(hessian)) if act_order else np.arange(len(hessian))
    inverse = np.linalg.inv(hessian + damp * np.diag(hessian).mean() * np.eye(len(hessian)))
    codes, fitted = np.zeros(left.shape, int), {}
    if act_order:
        fitted = {g: fit(left[:, g * size : (g + 1) * size], bits, symmetric) for g in range(left.shape[1] // size)}
    for column in order:
        group = column // size
        if group not in fitted:
            fitted[group] = fit((left * kept)[:, column : column + size], bits, symmetric)
        scale, zero = fitted[group]
        code = np.clip(np.round(left[:, column] / scale) + zero, 0, 2**bits - 1)
        codes[:, column] = np.where(kept[:, column], code, zero)
        error = left[:, column] - (codes[:, column] - zero) * scale
        left -= np.outer(error, inverse[column]) / inverse[column, column]
        inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return codes


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bits, size, symmetric", GRIDS)
def test_the_codes_are_those_of_the_full_update(bits, size, symmetric, seed):
    weight, inputs = draw(seed=seed)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) > 0.4
    settings = {"bits": bits, "group_size": size, "symmetric": symmetric, "block_size": 32}
    expected = brute_force(weight, inputs, bits, size, symmetric)
    assert np.array_equal(solve(weight, inputs, **settings).codes.numpy(), expected)
    expected = brute_force(weight, inputs, bits, size, symmetric, act_order=True)
    assert np.array_equal(solve(weight, inputs, act_order=True, **settings).codes.numpy(), expected)
    pruned = weight * mask
    expected = brute_force(pruned, inputs, bits, size, symmetric, mask=mask)
    assert np.array_equal(solve(pruned, inputs, mask, **settings).codes.numpy(), expected)


@pytest.mark.parametrize("size", (None, 64, 32))
def test_the_size_of_a_block_does_not_matter(size):
    weight, inputs = draw(columns=256, tokens=600)
    codes = [solve(weight, inputs, group_size=size, block_size=block).codes for block in (32, 64, 128, 256)]
    assert all(torch.equal(codes[0], other) for other in codes[1:])


def test_without_correlations_there_is_nothing_to_make_up_for():
    weight, _ = draw()
    rounded = rtn.solve(weight, rtn.Options(3, 32))
    assert torch.equal(solve(weight, torch.eye(64), bits=3, group_size=32).codes, rounded.codes)


def test_the_statistic_is_the_mean_over_all_tokens_however_they_come():
    _, inputs = draw(tokens=300)
    options = gptq.Options()
    statistic = gptq.Statistic(64, options)
    for part in inputs.bfloat16().split((1, 100, 199)):
        statistic.feed(part)
    exact = inputs.bfloat16().double()
    torch.testing.assert_close(statistic.hessian.double(), 2 / 300 * exact.T @ exact, rtol=1e-5, atol=1e-5)
    first = statistic.factor(0.01)
    assert statistic.factor(0.01) is first and statistic.factor(0.1) is not first
    statistic.feed(inputs)
    assert statistic.factor(0.01) is not first
    statistic.free()
    assert statistic.hessian is None


def test_the_factor_is_that_of_the_inverse():
    _, inputs = draw()
    hessian = fed(inputs, None).hessian
    upper = gptq.factorize(hessian, 0.05).upper.double()
    damped = hessian.double() + 0.05 * hessian.double().diagonal().mean() * torch.eye(64)
    torch.testing.assert_close(upper.T @ upper @ damped, torch.eye(64, dtype=torch.float64), rtol=0, atol=1e-4)
    assert torch.equal(upper, upper.triu())


def test_columns_that_never_get_an_input_are_zero_and_hurt_no_other():
    weight, inputs = draw()
    dead = [3, 40]
    inputs[:, dead] = 0
    for act_order in (False, True):
        solved = solve(weight, inputs, bits=3, group_size=32, act_order=act_order)
        assert solved.dequantize()[:, dead].abs().max() == 0 and solved.dequantize().isfinite().all()
        nearest = rtn.solve(weight, rtn.Options(3, 32))
        assert output_error(solved, weight, inputs) < output_error(nearest, weight, inputs)
    assert solve(weight, torch.zeros(5, 64), group_size=32).dequantize().abs().max() == 0


def test_a_singular_hessian_gets_more_damping():
    weight, inputs = draw(tokens=5)
    solved = solve(weight, inputs, damp=0.0, group_size=32)
    assert solved.dequantize().isfinite().all()
    assert output_error(solved, weight, inputs) < output_error(rtn.solve(weight, rtn.Options(4, 32)), weight, inputs)


def test_what_cannot_be_solved_is_said():
    weight, inputs = draw()
    with pytest.raises(UserError, match="damp: 0.01 and up to 10 leave the Hessian of 64 inputs singular"):
        gptq.factorize(-100 * torch.eye(64) + torch.diag(torch.arange(64.0) * 2))
    inputs[7, 7] = float("inf")
    with pytest.raises(UserError, match="infinite or not a number"):
        solve(weight, inputs)
    for statistic in (None, gptq.Statistic(64, gptq.Options())):
        with pytest.raises(UserError, match="calibration: "):
            gptq.solve(weight, gptq.Options(group_size=32), statistic=statistic)


def test_nothing_is_modified_nothing_is_drawn_and_the_result_is_the_same_again():
    weight, inputs = draw()
    mask = weight.abs() > 0.5
    given, state, statistic = weight.clone(), torch.get_rng_state(), fed(inputs, gptq.Options())
    hessian = statistic.hessian.clone()
    first, second = (gptq.solve(weight, gptq.Options(group_size=32), mask, statistic) for _ in range(2))
    assert torch.equal(weight, given) and torch.equal(statistic.hessian, hessian)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.codes, second.codes) and torch.equal(first.scales, second.scales)
    assert first.codes.dtype == first.zeros.dtype == torch.uint8 and first.scales.dtype == torch.bfloat16
    assert first.codes.is_contiguous() and first.scales.is_contiguous() and first.zeros.is_contiguous()


@pytest.fixture(scope="module")
def errors(reference_linears):
    """Output error of every linear by bits, group size and symmetry, of GPTQ and (by bits) of round-to-nearest."""
    found, groups = {}, {}
    for path, weight, inputs in reference_linears:
        groups.setdefault(id(inputs), (inputs, []))[1].append((path, weight))
    wanted = [(b, s, False) for b in (2, 3, 4) for s in (128, 32)] + [(b, 128, True) for b in (2, 3, 4)]
    for inputs, members in groups.values():
        statistic, rows = fed(inputs, gptq.Options()), [len(weight) for _, weight in members]
        together = torch.cat([weight for _, weight in members])  # rows do not touch each other, so this is faster only
        solved = {grid: gptq.solve(together, gptq.Options(*grid), None, statistic) for grid in wanted}
        solved |= {bits: rtn.solve(together, rtn.Options(bits, 128)) for bits in (2, 3, 4)}
        for key, result in solved.items():
            lost = (result.dequantize() - together.float()).double()
            by_row = ((lost @ statistic.hessian.double()) * lost).sum(1)  # the squared output error through the Hessian
            for (path, _), part in zip(members, by_row.split(rows)):
                found[path, key] = part.sum().item()
    return found


def test_real_layers_come_out_in_the_order_of_theory(errors):
    paths = dict.fromkeys(key[0] for key in errors)
    assert len(paths) == 42
    for path in paths:
        for bits in (4, 3, 2):
            assert errors[path, (bits, 128, False)] < errors[path, bits], f"{path}: against rounding, {bits} bits"
            assert errors[path, (bits, 128, False)] <= errors[path, (bits, 128, True)], f"{path}: zeros, {bits} bits"
            # At 2 bits a symmetric grid cannot hold its own extreme, so only fitted zeros are compared across sizes.
            assert errors[path, (bits, 32, False)] <= errors[path, (bits, 128, False)], f"{path}: groups, {bits} bits"
        for size, symmetric in ((128, False), (32, False), (128, True)):
            two, three, four = (errors[path, (bits, size, symmetric)] for bits in (2, 3, 4))
            assert four < three < two, f"{path}: bits, groups of {size}"


def test_a_mask_on_real_layers_is_kept_and_made_up_for(reference_linears):
    for path, weight, inputs in reference_linears[::6]:
        mask = weight.abs() >= weight.float().abs().median()
        pruned = weight * mask
        solved = solve(pruned, inputs, mask, bits=3)
        assert solved.dequantize()[~mask].abs().max() == 0, path
        error = output_error(solved, pruned, inputs)
        assert error < output_error(rtn.solve(pruned, rtn.Options(3, 128)), pruned, inputs), path
        unaware = torch.where(mask, solve(pruned, inputs, bits=3).dequantize(), 0.0)
        assert error < (inputs.double() @ (unaware - pruned.float()).double().T).norm().item(), path


@pytest.mark.parametrize("pruned", (False, True))
def test_a_model_is_compressed_and_its_zeros_stay(model_folder, tmp_path, pruned):
    text = tmp_path / "text.txt"
    lines = (f"def add{number}(first, second):\n    return first + {number} * second\n" for number in range(2000))
    text.write_text("".join(lines), encoding="utf-8")
    subject, masks = load(str(model_folder())), {}
    if pruned:
        for index, block in enumerate(blocks_of(subject.model)):
            for name, linear in linears_of(subject.model, block).items():
                mask = linear.weight.abs() > linear.weight.float().abs().median()
                put_pruned(linear, PrunedWeight(linear.weight.detach().clone(), mask))
                masks[f"model.layers.{index}.{name}"] = mask_of(linear)
    state = torch.get_rng_state()
    recipe = [{"pass": "gptq", "bits": 4, "group_size": 32}]
    result = compress(subject, recipe, Calibration(text=str(text), samples=4, length=32))
    packed = packed_layers(result.model)
    assert len(packed) == 14 and torch.equal(torch.get_rng_state(), state)
    assert result.measurements["compress.calibration_tokens"].value == 4 * 32
    for name, mask in masks.items():
        assert packed[name].compressed().dequantize()[~mask].abs().max() == 0
