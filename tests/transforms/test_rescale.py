"""AWQ and SmoothQuant: the function stays, masks stay, and what they promise of the rounding error holds."""

import itertools

import pytest
import torch

from qlib.compress import compress
from qlib.errors import UserError
from qlib.layers import packed_layers
from qlib.models.families import blocks_of, linears_of
from qlib.models.load import load
from qlib.params import Calibration
from qlib.prune.mask import PrunedWeight, mask_of, put_pruned
from qlib.quantize import rtn
from qlib.quantize.grid import Grid, fit_grid, round_to_grid
from qlib.transforms import awq, smooth

SHAPES = [{}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1}]
BIASED = {"llama": {"attention_bias": True, "mlp_bias": True}}
PASSES = [(awq, awq.Options(clip=False)), (smooth, smooth.Options(inner=True))]
GRID = rtn.Options(3, 32)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama", "mistral"])
@pytest.mark.parametrize("shape, step", itertools.product(SHAPES, PASSES))
def test_logits_are_unchanged(subject, transform, logits, kind, shape, step):
    one = subject(kind, tied=bool(shape), **shape, **BIASED.get(kind, {}))
    before, weights = logits(one), {name: p.clone() for name, p in one.model.named_parameters()}
    transform(one, *step, GRID)
    changed = {name.split(".", 3)[3] for name, p in one.model.named_parameters() if not torch.equal(p, weights[name])}
    assert {f"{name}.weight" for name in ("input_layernorm", "self_attn.v_proj", "mlp.up_proj")} <= changed
    assert (logits(one) - before).abs().max() < 1e-4 * before.abs().max()


def test_in_bf16_the_norm_is_divided_exactly(subject, transform, logits):
    """What the norm lost when it was rounded is in the weights, so only their own rounding is left."""
    one = subject("qwen2")
    one.model.bfloat16()
    norm = blocks_of(one.model)[0].input_layernorm.weight.clone()
    query = blocks_of(one.model)[0].self_attn.q_proj.weight.clone()
    transform(one, smooth, smooth.Options(), None)
    block = blocks_of(one.model)[0]
    product = block.input_layernorm.weight.float() * block.self_attn.q_proj.weight.float()
    assert ((product / (norm.float() * query.float())) - 1).abs().max() < 2.0**-8


def output_error(weight, inputs, grid, scale):
    """||X W^T - (X / s) Q(W s)^T||^2 per token, in float64, with the inputs themselves and not their Gram matrix."""
    scaled = weight * scale
    rounded = round_to_grid(scaled, grid, *fit_grid(scaled, grid)).dequantize().double()
    return ((inputs.double() / scale.double()) @ rounded.T - inputs.double() @ weight.double().T).square().sum(1).mean()


def test_the_error_of_a_scale_is_that_of_the_outputs():
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(24, 64, generator=generator), torch.randn(200, 64, generator=generator)
    scale, seen = torch.rand(64, generator=generator) + 0.5, awq.Inputs(64)
    for part in inputs.split(64):
        seen.feed(part)
    assert torch.allclose(seen.magnitude, inputs.abs().mean(0), atol=1e-6)
    for grid in (Grid(3, 32), Grid(4, None, True), Grid(4, 32, True, "mxfp4"), Grid(8, None, True, "fp8")):
        expected = output_error(weight, inputs, grid, scale).item()
        assert awq.scale_error(weight, grid, seen.gram, scale) == pytest.approx(expected, rel=1e-4)


def test_the_error_of_a_scale_can_count_the_cut():
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(24, 64, generator=generator), torch.randn(200, 64, generator=generator)
    scale, grid, gram = torch.rand(64, generator=generator) + 0.5, Grid(2, 32), inputs.T @ inputs / 200
    cut = awq.cut_ranges(weight * scale, grid, gram, scale)
    rounded = round_to_grid(cut, grid, *fit_grid(cut, grid)).dequantize() / scale
    expected = (inputs.double() @ (rounded - weight).double().T).square().sum(1).mean().item()
    assert awq.scale_error(weight, grid, gram, scale, awq.CUTS) == pytest.approx(expected, rel=1e-4)
    assert expected < awq.scale_error(weight, grid, gram, scale)


@pytest.mark.parametrize("grid", [Grid(3, 32), Grid(4, 16, True, "nvfp4"), Grid(8, "tensor", True, "fp8")])
def test_taking_a_few_rows_at_once_changes_nothing(grid, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(24, 64, generator=generator), torch.randn(200, 64, generator=generator)
    scale, gram = torch.rand(64, generator=generator) + 0.5, inputs.T @ inputs / 200
    whole = awq.cut_ranges(weight, grid, gram, scale)
    monkeypatch.setattr(awq, "PRODUCT_ROWS", 5)
    monkeypatch.setattr(awq, "rows_at_once", lambda weight: 1)
    expected = output_error(weight, inputs, grid, scale).item()
    assert awq.scale_error(weight, grid, gram, scale) == pytest.approx(expected, rel=1e-4)
    assert torch.equal(awq.cut_ranges(weight, grid, gram, scale), whole)


@pytest.mark.parametrize("bits, weights", itertools.product((2, 3, 4), (False, True)))
@torch.no_grad()
def test_the_search_never_ends_worse_than_without_scales(subject, transform, linears, ids, bits, weights):
    plain, scaled, rounding = subject("qwen3"), subject("qwen3"), rtn.Options(bits, 32)
    seen, better = {}, 0
    for number, (block, names) in enumerate(linears(plain)):
        block.get_submodule(names[0]).register_forward_pre_hook(
            lambda _, args, number=number: seen.setdefault(number, []).append(args[0].flatten(0, -2))
        )
    for batch in ids:
        plain.model(batch)
    transform(scaled, awq, awq.Options(weights=weights, clip=False), rounding)
    for number, ((block, names), (other, _)) in enumerate(zip(linears(plain), linears(scaled))):
        inputs, errors = torch.cat(seen[number]), []
        for one in (block, other):
            own = inputs if one is block else inputs * ratio(block, other, names)
            parts = [(one.get_submodule(name).weight, own) for name in names]
            errors.append(sum(output_error(weight, x, rounding.grid, torch.ones(len(x[0]))) for weight, x in parts))
        assert errors[1] <= errors[0] * (1 + 1e-4)
        better += errors[1] < 0.999 * errors[0]
    assert better >= 4


def ratio(block, other, names):
    """What the inputs of scaled linears are divided by, read off their weights."""
    before, after = (one.get_submodule(names[0]).weight for one in (block, other))
    return (before / after).nanmean(0)


@pytest.mark.parametrize("bits, size, symmetric", [(2, 32, False), (3, 16, True), (3, None, False)])
def test_every_group_gets_the_cut_with_the_least_error(bits, size, symmetric):
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(6, 64, generator=generator), torch.randn(300, 64, generator=generator)
    weight[:, 5], inputs[:, 5] = 6.0, inputs[:, 5] / 100  # a large weight of a channel that hardly matters
    scale = torch.rand(64, generator=generator) + 0.5
    before = inputs * scale  # what the inputs were before they were divided
    found = awq.cut_ranges(weight, Grid(bits, size, symmetric), before.T @ before / 300, scale)
    cuts = []
    for row, start in itertools.product(range(6), range(0, 64, size or 64)):
        group = slice(start, start + (size or 64))
        part, x, errors = weight[row, group], inputs[:, group].double(), []
        tried = [part.clamp(part.min() * cut, part.max() * cut) for cut in awq.CUTS]
        for one in tried:
            grid = Grid(bits, None, symmetric)
            rounded = round_to_grid(one[None], grid, *fit_grid(one[None], grid)).dequantize()[0].double()
            errors.append((x @ (rounded - part.double())).square().sum().item())
        cuts.append(errors.index(min(errors)))
        assert torch.equal(found[row, group], tried[cuts[-1]])
    assert len(set(cuts)) > 1


@torch.no_grad()
def test_half_gives_inputs_and_weights_the_same_largest_magnitudes(subject, transform, linears, ids):
    one, seen = subject("qwen2"), {}
    transform(one, smooth, smooth.Options(alpha=0.5))
    for block, names in linears(one):
        block.get_submodule(names[0]).register_forward_pre_hook(
            lambda _, args, key=(block, names): seen.setdefault(key, []).append(args[0].flatten(0, -2))
        )
    for batch in ids:
        one.model(batch)
    for (block, names), batches in seen.items():
        if "o_proj" not in names[0] and "down_proj" not in names[0]:
            weights = torch.cat([block.get_submodule(name).weight for name in names]).abs().amax(0)
            assert torch.allclose(torch.cat(batches).abs().amax(0), weights, rtol=1e-4)


@torch.no_grad()
def test_with_outliers_smoothing_lowers_the_error_of_eight_bit_inputs_and_weights(subject, transform, ids):
    one, eight = subject("llama"), Grid(8, None, True)
    blocks_of(one.model)[0].input_layernorm.weight[[3, 17]] = 60.0

    def error():
        """Relative error of q_proj's output with inputs rounded token by token and weights row by row."""
        seen, linear = [], blocks_of(one.model)[0].self_attn.q_proj
        handle = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
        one.model(ids[0])
        handle.remove()
        rounded = [round_to_grid(x, eight, *fit_grid(x, eight)).dequantize() for x in (seen[0], linear.weight)]
        exact = seen[0] @ linear.weight.T
        return ((rounded[0] @ rounded[1].T - exact).norm() / exact.norm()).item()

    before = error()
    transform(one, smooth, smooth.Options(alpha=0.5))
    assert error() < 0.6 * before


@pytest.mark.parametrize("step", [{"pass": "awq"}, {"pass": "smooth", "inner": True}])
def test_masks_survive(model_folder, step):
    subject = load(str(model_folder()))
    for block in blocks_of(subject.model):
        for linear in linears_of(subject.model, block).values():
            draw = torch.rand(linear.weight.shape, generator=torch.Generator().manual_seed(3))
            put_pruned(linear, PrunedWeight(linear.weight.detach(), draw > 0.4))
    masks = [mask_of(l) for block in blocks_of(subject.model) for l in linears_of(subject.model, block).values()]
    compress(subject, [step, {"pass": "rtn", "bits": 8, "group_size": 32}], Calibration(samples=4, length=32))
    packed = packed_layers(subject.model).values()
    assert all((layer.compressed().dequantize()[~mask] == 0).all() for layer, mask in zip(packed, masks))
    assert all(mask_of(layer) is not None for layer in packed)


RTN, GPTQ = {"pass": "rtn", "bits": 4, "group_size": 32}, {"pass": "gptq", "bits": 3, "group_size": 32}
W8A8 = {"pass": "rtn", "bits": 8, "group_size": None, "symmetric": True, "activations": "int8"}


@pytest.mark.parametrize("recipe", [[{"pass": "awq"}, RTN], [{"pass": "awq"}, GPTQ], [{"pass": "smooth"}, W8A8]])
def test_they_compose_with_what_puts_weights_on_a_grid(model_folder, recipe):
    folder = str(model_folder("qwen2"))
    subject, original = compress(load(folder), recipe, Calibration(samples=4, length=32)), load(folder)
    assert len(packed_layers(subject.model)) == 14
    ids = torch.arange(40)[None]
    with torch.no_grad():
        ours, theirs = (one.model(ids).logits.float() for one in (subject, original))
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=-1).mean() > (0.9 if recipe[1] is GPTQ else 0.97)


@pytest.mark.parametrize(
    "recipe, words",
    [
        ([{"pass": "awq"}], "recipe[0]: pass 'awq' prepares for a grid, but none follows"),
        ([RTN, {"pass": "awq"}], "recipe[1]: pass 'awq' prepares for a grid, but none follows"),
        ([RTN, {"pass": "smooth"}], "recipe[1]: pass 'smooth' prepares for a grid"),
        ([{"pass": "smooth", "alpha": 1.5}, RTN], "recipe[0].alpha: 1.5 is not allowed; allowed: 0 to 1"),
    ],
)
def test_what_cannot_work_is_refused(model_folder, recipe, words):
    subject = load(str(model_folder()))
    with pytest.raises(UserError) as caught:
        compress(subject, recipe, Calibration(samples=4, length=32))
    assert words in str(caught.value) and not packed_layers(subject.model)
