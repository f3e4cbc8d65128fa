"""GPTQ against the update it is derived from, in float64 with the full inverse Hessian, and on real layers."""

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlib.compress import compress
from qlib.errors import UserError
from qlib.layers import native, packed_layers
from qlib.models.families import blocks_of, linears_of
from qlib.models.load import load
from qlib.params import Calibration
from qlib.prune.mask import PrunedWeight, mask_of, put_pruned
from qlib.quantize import clip, gptq, rtn
from qlib.quantize.grid import round_to_grid

INT_GRIDS = [{"bits": b, "group_size": s, "symmetric": y} for b in (4, 3, 2) for s in (None, 32) for y in (False, True)]
FLOAT_GRIDS = [
    {"bits": 8, "group_size": None, "element": "fp8"},
    {"bits": 8, "group_size": "tensor", "element": "fp8"},
    {"element": "mxfp4"},
    {"element": "nvfp4"},
]
#: The numbers of e2m1 and of e4m3 (where 480 would be "not a number"), from their definitions.
E2M1 = [0, 0.5] + [2.0**e * (1 + m / 2) for e in range(3) for m in range(2)]
E4M3 = [m / 512 for m in range(8)] + [2.0**e * (1 + m / 8) for e in range(-6, 9) for m in range(8)][:-1]


def draw(rows=12, columns=64, tokens=256, seed=0):
    """A weight and correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=generator)
    inputs = torch.randn(tokens, columns, generator=generator) @ mix
    return torch.randn(rows, columns, generator=generator), inputs


def fed(inputs, options=gptq.Options()):
    statistic = gptq.Statistic(inputs.shape[1], options)
    statistic.feed(inputs)
    return statistic


def solve(weight, inputs, mask=None, **settings):
    options = gptq.Options(**settings)
    return gptq.solve(weight, options, mask, fed(inputs, options))


def output_error(compressed, weight, inputs):
    """||X W^T - X Q^T|| in float64."""
    return (inputs.double() @ (compressed.dequantize() - weight.float()).double().T).norm().item()


def nearest(values, numbers):
    """Of each value the nearest of the sorted numbers, and its sign kept."""
    numbers = np.array(numbers)
    return np.sign(values) * numbers[np.abs(np.abs(values)[..., None] - numbers).argmin(-1)]


def fit(group, options, tensor_scale):
    """Scale and zero of each row of a group, from the definition of the format."""
    low, high = np.minimum(group.min(1), 0), np.maximum(group.max(1), 0)
    largest = np.maximum(-low, high)
    if options.element == "mxfp4":
        return 2.0 ** (np.floor(np.log2(largest)) - 2), 0
    if options.element == "nvfp4":
        return nearest(largest / 6 / tensor_scale, E4M3) * tensor_scale, 0
    if options.element == "fp8":
        largest = np.full_like(largest, largest.max()) if options.group_size == "tensor" else largest
        return torch.tensor(largest / 448).bfloat16().double().numpy(), 0
    if options.symmetric:
        low, high = -largest, largest
    scale = torch.tensor((high - low) / (2**options.bits - 1)).bfloat16().double().numpy()
    scale[scale == 0] = 1
    return scale, 2 ** (options.bits - 1) if options.symmetric else np.round(-low / scale)


def on_grid(values, options, scale, zero):
    """The nearest number of the grid to each value."""
    if options.element == "int":
        return (np.clip(np.round(values / scale) + zero, 0, 2**options.bits - 1) - zero) * scale
    return nearest(values / scale, E4M3 if options.element == "fp8" else E2M1) * scale


def brute_force(weight, inputs, mask=None, **settings):
    """Optimal brain quantization in a fixed order: after each column the others move by its error times its row of the
    inverse Hessian, and the column is eliminated from that inverse. No factorization, no blocks, float64.

    Returns the rounded weight `[out, in]`.
    """
    options = gptq.Options(**settings)
    left, x = weight.double().numpy().copy(), inputs.double().numpy()
    kept = np.ones(left.shape, bool) if mask is None else mask.numpy()
    size = left.shape[1] // options.grid.groups(left.shape[1])
    hessian = x.T @ x
    dead = np.diag(hessian) == 0
    hessian[dead, dead] = 1
    left[:, dead] = 0
    left *= kept
    tensor_scale = np.abs(left).max() / 6 / 448
    order = np.argsort(-np.diag(hessian), kind="stable") if options.act_order else np.arange(len(hessian))
    inverse = np.linalg.inv(hessian + options.damp * np.diag(hessian).mean() * np.eye(len(hessian)))
    rounded, fitted = np.zeros(left.shape), {}
    if options.act_order:
        whole = range(left.shape[1] // size)
        fitted = {g: fit(left[:, g * size : (g + 1) * size], options, tensor_scale) for g in whole}
    for column in order:
        group = column // size
        if group not in fitted:
            fitted[group] = fit((left * kept)[:, column : column + size], options, tensor_scale)
        rounded[:, column] = on_grid(left[:, column], options, *fitted[group]) * kept[:, column]
        error = left[:, column] - rounded[:, column]
        left -= np.outer(error, inverse[column]) / inverse[column, column]
        inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return rounded


def assert_close(solved, expected):
    """The same numbers of the grid: what is left is fp32 against float64."""
    np.testing.assert_allclose(solved.dequantize().numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("grid", INT_GRIDS + FLOAT_GRIDS, ids=str)
def test_the_result_is_that_of_the_full_update(grid):
    weight, inputs = draw(columns=96)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) > 0.4
    for settings in ({}, {"act_order": True}, {"damp": 0.2}):
        assert_close(solve(weight, inputs, **grid, **settings), brute_force(weight, inputs, **grid, **settings))
        pruned = solve(weight * mask, inputs, mask, **grid, **settings)
        assert_close(pruned, brute_force(weight * mask, inputs, mask, **grid, **settings))
        assert pruned.dequantize()[~mask].abs().max() == 0


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 3),
    size=st.sampled_from([None, 32, 64, 128]),
    bits=st.sampled_from([2, 3, 4, 5, 6, 8]),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    seed=st.integers(0, 99),
)
@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
def test_the_result_is_that_of_the_full_update_for_any_shape(rows, columns, size, bits, flags, seed):
    symmetric, act_order, masked = flags
    columns = columns * size if size else 33 * columns - 32
    weight, inputs = draw(rows, columns, 2 * columns + 8, seed)
    inputs[:, seed % columns] = 0  # a dead column
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) > 0.3 if masked else None
    weight = weight if mask is None else weight * mask
    settings = {"bits": bits, "group_size": size, "symmetric": symmetric, "act_order": act_order}
    assert_close(solve(weight, inputs, mask, **settings), brute_force(weight, inputs, mask, **settings))


def test_without_correlations_there_is_nothing_to_make_up_for():
    weight, _ = draw()
    rounded = rtn.solve(weight, rtn.Options(3, 32))
    assert torch.equal(solve(weight, torch.eye(64), bits=3, group_size=32).codes, rounded.codes)


@pytest.mark.parametrize("width", (64, 300))
def test_the_statistic_is_the_sum_over_all_tokens_however_they_come(width):
    _, inputs = draw(columns=width, tokens=300)
    exact = inputs.bfloat16().double()
    for batch in (inputs.bfloat16(), inputs.bfloat16().float()):
        before = torch.backends.mkldnn.matmul.fp32_precision
        statistic = gptq.Statistic(width, gptq.Options())
        for part in batch.split((1, 100, 199)):
            statistic.feed(part)
        assert torch.backends.mkldnn.matmul.fp32_precision == before
        first = statistic.factor(0.01)
        torch.testing.assert_close(statistic.hessian.double(), exact.T @ exact, rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(first.energy.double(), (exact**2).sum(0), rtol=1e-5, atol=0)
        assert statistic.factor(0.01) is first and statistic.factor(0.1) is not first
        statistic.feed(batch)
        assert statistic.factor(0.01) is not first
        statistic.free()
        assert statistic.hessian is None and not statistic.notes


@pytest.mark.parametrize("act_order", (False, True))
def test_the_factor_is_that_of_the_damped_hessian(act_order):
    _, inputs = draw(tokens=600)
    hessian = inputs.T @ inputs
    factor = gptq.factorize(hessian, 0.05, act_order)
    order = torch.arange(64) if factor.order is None else factor.order
    damped = (hessian.double() + 0.05 * hessian.double().diagonal().mean() * torch.eye(64))[order][:, order]
    upper = factor.upper.double()
    assert torch.equal(upper, upper.triu()) and (upper.diagonal() == 1).all()
    # U D U^T = H with D diagonal, so U^-1 H U^-T has nothing beside its diagonal.
    middle = torch.linalg.inv(upper) @ damped @ torch.linalg.inv(upper).T
    torch.testing.assert_close(middle, middle.diagonal().diag(), rtol=0, atol=1e-4 * middle.diagonal().max().item())
    assert factor.damp == 0.05 and not factor.dead.any()


def test_columns_that_never_get_an_input_are_zero_and_hurt_no_other():
    weight, inputs = draw()
    dead = [3, 40]
    inputs[:, dead] = 0
    for act_order in (False, True):
        solved = solve(weight, inputs, bits=3, group_size=32, act_order=act_order)
        assert solved.dequantize()[:, dead].abs().max() == 0 and solved.dequantize().isfinite().all()
        rounded = rtn.solve(weight, rtn.Options(3, 32))
        assert output_error(solved, weight, inputs) < output_error(rounded, weight, inputs)
    assert solve(weight, torch.zeros(5, 64), group_size=32).dequantize().abs().max() == 0


def test_a_singular_hessian_gets_more_damping_and_the_record_hears_of_it():
    weight, inputs = draw(tokens=5)
    inputs[:, 9] = 0
    statistic, options = fed(inputs), gptq.Options(damp=0.0, group_size=32)
    solved = gptq.solve(weight, options, statistic=statistic)
    assert statistic.notes["damp"] in (1e-3, 1e-2, 1e-1) and statistic.notes["dead"] == 1
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


FLOATS_AND_RANGES = [*FLOAT_GRIDS[1:], {"bits": 2}, {"bits": 2, "clip": "mse"}, {"bits": 2, "clip": "activations"}]


@pytest.mark.parametrize("act_order", (False, True))
def test_on_real_layers_it_beats_rounding_on_every_grid_and_a_searched_range_helps(reference_linears, act_order):
    totals = dict.fromkeys(map(str, FLOATS_AND_RANGES), 0.0)
    for path, weight, inputs in reference_linears[act_order::7]:
        statistic = fed(inputs)
        for settings in FLOATS_AND_RANGES:
            options = gptq.Options(**settings, act_order=act_order)
            solved = gptq.solve(weight, options, None, statistic)
            ranges = clip.fit(weight, options.grid, options.clip, statistic.factor(0.01, act_order).energy)
            error = output_error(solved, weight, inputs)
            assert error < output_error(round_to_grid(weight, options.grid, *ranges), weight, inputs), (path, settings)
            totals[str(settings)] += error / (inputs.double() @ weight.double().T).norm().item()
    plain, squared, weighted = list(totals.values())[-3:]
    assert squared < plain and weighted < plain


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
    recipe = [{"pass": "gptq", "bits": 4, "group_size": 32, "true_sequential": pruned}]
    result = compress(subject, recipe, Calibration(text=str(text), samples=4, length=32))
    packed = packed_layers(result.model)
    assert len(packed) == 14 and torch.equal(torch.get_rng_state(), state)
    assert result.measurements["compress.calibration_tokens"].value == 4 * 32
    for name, mask in masks.items():
        assert packed[name].compressed().dequantize()[~mask].abs().max() == 0


@pytest.mark.skipif(bool(native.missing()), reason=f"no kernels of our own: {native.missing()}")
@pytest.mark.parametrize("masked", [False, True])
def test_columns_rounded_in_c_are_those_rounded_by_torch(monkeypatch, masked):
    random = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(200, 160, generator=random), torch.randn(400, 160, generator=random)
    mask = torch.rand(weight.shape, generator=random) > 0.4 if masked else None
    options, found = gptq.Options(bits=3, group_size=32), []
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr(native, "takes", lambda *_: False)
        statistic = gptq.Statistic(160, options)
        statistic.feed(inputs)
        found.append(gptq.solve(weight, options, mask=mask, statistic=statistic).dequantize())
    rows = (found[0] == found[1]).all(1)  # a row whose sums end on a tie goes its own way from there
    errors = [((one - weight) @ inputs.t()).norm() for one in found]
    assert rows.float().mean() > 0.9 and abs(errors[0] / errors[1] - 1) < 1e-3
