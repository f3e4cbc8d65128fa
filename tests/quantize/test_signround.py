"""Rounding optimisation: gradients against autograd in float64, and what it promises of a block."""

import importlib

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qlib.errors import UserError
from qlib.layers import packed_layers
from qlib.models.families import blocks_of, family_of
from qlib.quantize import signround
from qlib.quantize.grid import Grid, fit_grid, round_to_grid
from qlib.quantize.rounding import Rounding
from qlib.quantize.signround import Options, apply, check, learn
from qlib.recipe import BlockContext
from qlib.walk import first_inputs, run_block

compress = importlib.import_module("qlib.compress")
SHORT = {"bits": 2, "group_size": 32, "iterations": 12, "batch": 2}


def plain(weight, offset, alpha, beta, grid, mask):
    """The paper's formula in float64, rounding made straight-through by autograd's own means."""

    def rounded(x, to):
        return x + (to(x.detach()) - x).detach()

    grouped = weight.double().view(offset.shape)
    low, high = grouped.amin(-1, True).clamp(max=0), grouped.amax(-1, True).clamp(min=0)
    if grid.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scale = rounded((beta * high - alpha * low) / (grid.levels - 1), lambda x: x.float().bfloat16().double())
    zero = grid.levels / 2
    if not grid.symmetric:  # a code itself, which a scale rounded down could put out of range
        zero = rounded(-alpha * low / scale, lambda x: x.round().clamp(0, grid.levels - 1))
    code = (rounded(grouped / scale + offset, torch.round) + zero).clamp(0, grid.levels - 1)
    return torch.where(mask, (code - zero) * scale, 0.0).view(weight.shape)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([2, 3, 4, 5, 8]), st.sampled_from([4, 8, None]), st.booleans(), st.booleans(), st.integers(0, 99)
)  # fmt: skip
def test_the_gradient_in_closed_form_is_that_of_the_formula(bits, size, symmetric, pruned, seed):
    generator, grid = torch.Generator().manual_seed(seed), Grid(bits, size, symmetric)
    weight = torch.randn(6, 16, generator=generator)
    mask = torch.rand(6, 16, generator=generator) > 0.3 if pruned else torch.ones(6, 16, dtype=torch.bool)
    weight = (weight * mask).bfloat16()
    rounding = Rounding(weight, grid, mask if pruned else None)
    for value, low, high in zip(rounding.learned, (-0.5, 0.4, 0.4), (0.5, 1.0, 1.0)):
        value.data.uniform_(low, high, generator=generator)
    upstream = torch.randn(6, 16, generator=generator).bfloat16()
    ours = torch.autograd.grad(rounding.quantized(), rounding.learned, upstream)
    exact = [value.detach().double().requires_grad_() for value in rounding.learned]
    kept = mask.view(exact[0].shape)
    expected = plain(weight, *exact, grid, kept)
    offset, alpha, beta = (value.detach() for value in exact)
    for sign in (-1, 1):  # where fp32 and float64 may round to different sides, there is nothing to compare
        nudged = plain(weight, offset + sign * 1e-4, alpha, beta, grid, kept)
        assume(torch.allclose(nudged, expected.detach(), rtol=1e-3))
        nudged = plain(weight, offset, alpha * (1 + sign * 2e-6), beta, grid, kept)
        assume(torch.allclose(nudged, expected.detach(), rtol=1e-3))
    theirs = torch.autograd.grad(expected, exact, upstream.double())
    torch.testing.assert_close(rounding.quantized().double(), expected.detach(), rtol=2**-8, atol=1e-30)
    torch.testing.assert_close(rounding.compressed().dequantize().double(), expected.detach(), rtol=1e-5, atol=0)
    for name, one, other in zip(("offset", "alpha", "beta"), ours, theirs):
        other = other.nan_to_num()  # the formula has no scale for a group that was pruned as a whole
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4, msg=lambda text: f"{name}: {text}")


def a_block(tiny_model, kind="qwen2", options=Options(**SHORT), seed=0, **chosen):
    """The first block of a tiny model and what a pass is told about it."""
    model = tiny_model(kind)
    ids = torch.randint(0, 300, (6, 24), generator=torch.Generator().manual_seed(1))
    inputs, block, groups = first_inputs(model, list(ids.split(4))), blocks_of(model)[0], family_of(model.config).groups
    targets = [hidden for hidden, _ in run_block(block, inputs)]
    rounding = {name: chosen.get(name.rpartition(".")[2], options) for names in groups for name in names}
    return block, BlockContext(0, "model.layers.0", groups, inputs, targets, rounding, model.config, seed)


def error(block, context):
    pairs = zip(run_block(block, context.inputs), context.targets)
    return sum((out.float() - target.float()).square().sum().item() for (out, _), target in pairs)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama", "mistral"])
def test_a_block_of_any_family_does_better_than_round_to_nearest(tiny_model, kind):
    block, context = a_block(tiny_model, kind, options := Options(**SHORT | {"iterations": 40}))
    plainly, _ = a_block(tiny_model, kind)
    for name, grid in ((name, given.grid) for name, given in context.rounding.items()):
        linear = plainly.get_submodule(name)
        linear.weight.data = round_to_grid(linear.weight, grid, *fit_grid(linear.weight, grid)).dequantize().bfloat16()
    apply(block, options, context)
    assert len(packed_layers(block)) == 7 and error(block, context) < 0.9 * error(plainly, context)


@pytest.mark.parametrize("rate", [1e-9, 0.05, 5.0])
def test_no_iterate_that_is_worse_than_the_start_is_kept(tiny_model, rate):
    block, context = a_block(tiny_model)
    found = {name: Rounding(block.get_submodule(name).weight, Grid(2, 32)) for name in context.rounding}
    windows = signround._Windows(block, context)

    def loss():
        weights = {f"{name}.weight": rounding.quantized() for name, rounding in found.items()}
        return windows.loss(weights, torch.arange(6)).item()

    first = loss()
    losses = learn(found, windows, Options(**SHORT, rate=rate), 0)
    last = loss()
    assert last == pytest.approx(min(losses), rel=1e-2) and last <= first * (1 + 1e-6)


def test_offsets_move_a_code_by_one_at_most_and_ranges_only_shrink(tiny_model):
    block, context = a_block(tiny_model)
    found = {name: Rounding(block.get_submodule(name).weight, Grid(3, 32)) for name in context.rounding}
    learn(found, signround._Windows(block, context), Options(**SHORT, rate=0.3), 0)
    for rounding in found.values():
        solved, fitted = rounding.compressed(), fit_grid(rounding.weight.view(rounding.shape), rounding.grid)
        nearest = round_to_grid(rounding.weight.view(rounding.shape), rounding.grid, solved.scales, solved.zeros).codes
        assert (solved.codes.int() - nearest.int()).abs().max() == 1
        assert (solved.scales <= fitted.scales).all()


def test_the_same_seed_gives_the_same_bits_and_global_state_is_left_alone(tiny_model):
    codes, state = [], torch.get_rng_state()
    for seed in (3, 3, 4):
        block, context = a_block(tiny_model, seed=seed)
        apply(block, Options(**SHORT), context)
        codes.append([layer.compressed().codes for layer in packed_layers(block).values()])
    same, other = zip(*codes[:2]), zip(codes[0], codes[2])
    assert all(torch.equal(*pair) for pair in same) and not all(torch.equal(*pair) for pair in other)
    assert torch.equal(torch.get_rng_state(), state)


def test_every_linear_gets_the_grid_chosen_for_it(tiny_model):
    block, context = a_block(tiny_model, down_proj=Options(4, 64), q_proj=Options(8, None, True))
    apply(block, Options(**SHORT), context)
    names = {name.rpartition(".")[2]: layer.grid.name for name, layer in packed_layers(block).items()}
    assert names["down_proj"] == "int4-g64" and names["q_proj"] == "int8" and names["k_proj"] == "int2-g32"


def a_recipe(monkeypatch, folder, steps, seed=0):
    from qlib.models.load import load

    ids = torch.randint(0, 300, (6, 24), generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(compress, "calibration_ids", lambda *told: list(ids.split(4)))
    return compress.compress(load(folder), steps, object(), seed)


def test_recipes_with_pruning_before_keep_the_mask(monkeypatch, model_folder):
    folder = str(model_folder())
    steps = [{"pass": "magnitude", "sparsity": 0.5}, {"pass": "signround", **SHORT}]
    subject = a_recipe(monkeypatch, folder, steps)
    layers = packed_layers(subject.model)
    assert len(layers) == 14
    for layer in layers.values():
        assert (layer.compressed().dequantize() == 0).float().mean() >= 0.5
    assert all(layer["grid"] == "int2-g32" and layer["kept"] <= 0.5 for layer in subject.details["layers"])


@pytest.mark.parametrize("before, after", [("awq", None), ("rotate", None), (None, "distil")])
def test_recipes_with_other_passes_run(monkeypatch, model_folder, before, after):
    steps = [{"pass": name} for name in (before,) if name] + [{"pass": "signround", **SHORT}]
    steps += [{"pass": after, "epochs": 1}] if after else []
    subject = a_recipe(monkeypatch, str(model_folder()), steps)
    assert {layer.grid.name for layer in packed_layers(subject.model).values()} == {"int2-g32"}


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"element": "mxfp4"}, "element: mxfp4 is not allowed with signround; allowed: int"),
        ({"bits": 8, "group_size": None, "symmetric": True, "activations": "int8"}, "activations: int8 is not allowed"),
        ({"clip": "mse"}, "clip: mse is not allowed with signround"),
        ({"rate": 0.0}, "rate: 0.0 is not allowed"),
        ({"iterations": 0}, "iterations: 0 is not allowed; allowed: at least 1"),
    ],
)
def test_what_cannot_be_learned_is_refused(wrong, words):
    with pytest.raises(UserError, match=words):
        check(None, Options(**wrong))
