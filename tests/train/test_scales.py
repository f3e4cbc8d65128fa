"""Training scales and zeros alone: codes stay, gradients are those of the formula, what was trained is what is packed."""

import pytest
import torch

from qlib.compress import compress
from qlib.errors import UserError
from qlib.layers import pack, packed_layers
from qlib.models.load import load
from qlib.params import Calibration
from qlib.prune.mask import mark_pruned, mask_of
from qlib.quantize.formats import Grid
from qlib.quantize.grid import fit_grid, round_to_grid
from qlib.train.fake_quant import SCALE_RATE
from qlib.train.ways.scales import ZERO_RATE, ScaledLinear


def layer(grid=Grid(3, 32), zeros=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(16, 64, generator=generator)
    weight = weight * (torch.rand(16, 64, generator=generator) >= zeros)
    linear = torch.nn.Linear(64, 16)
    packed = pack(linear, round_to_grid(weight, grid, *fit_grid(weight, grid)))
    if zeros:
        mark_pruned(packed)
    return packed


@pytest.mark.parametrize("grid", [Grid(2, 32), Grid(4, 64), Grid(3, None, True), Grid(8, None, True)], ids=lambda grid: grid.name)
@pytest.mark.parametrize("zeros", [0.0, 0.5])
def test_it_begins_as_the_packed_layer_and_ends_as_what_it_computed(grid, zeros):
    packed = layer(grid, zeros)
    stand_in = ScaledLinear(packed)
    assert torch.equal(stand_in.quantized(), packed.compressed().dequantize())
    with torch.no_grad():
        for parameter in (stand_in.log_scales, stand_in.shifts):
            if parameter is not None:
                parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    found = stand_in.compressed()
    assert torch.equal(found.dequantize(), stand_in.quantized())
    if zeros:
        assert ((found.dequantize() != 0) <= (packed.compressed().dequantize() != 0)).all(), "zeros of the mask stay"
    else:
        assert torch.equal(found.codes, packed.compressed().codes)
    assert (found.scales.sign() == packed.compressed().scales.sign()).all()


def test_gradients_are_those_of_the_formula():
    """Against float64 autograd of (code - zero) x scale, with rounding passed through."""
    stand_in = ScaledLinear(layer())
    x, wanted = torch.randn(5, 64), torch.randn(5, 16)
    ((stand_in(x) - wanted).square().sum()).backward()
    codes, zeros = stand_in.codes.double(), stand_in.zeros.double().requires_grad_(True)
    scales = stand_in.scales_and_zeros()[0].detach().double().requires_grad_(True)
    weight = ((codes - zeros[..., None]) * scales[..., None]).view(16, 64)
    (x.double() @ weight.T + stand_in.bias.double() - wanted.double()).square().sum().backward()
    exact = scales.grad * scales.detach() * SCALE_RATE  # of a logarithm, divided by the rate
    assert (stand_in.log_scales.grad - exact).norm() < 1e-2 * exact.norm()  # the stored scale is rounded to bf16
    moved = zeros.grad * ZERO_RATE
    inside = (zeros >= 0) & (zeros <= stand_in.grid.levels - 1)
    assert (stand_in.shifts.grad - moved)[inside].norm() < 1e-2 * moved.norm()


def test_in_a_recipe(model_folder, step):
    before = compress(load(str(model_folder())), [{"pass": "rtn", "bits": 3, "group_size": 32}])
    codes = {name: one.compressed().codes for name, one in packed_layers(before.model).items()}
    plain = {name: one.clone() for name, one in before.model.named_parameters()}
    recipe = [{"pass": "rtn", "bits": 3, "group_size": 32}, step | {"train": "scales"}]
    after = compress(load(str(model_folder())), recipe)
    training = after.details["training"][0]
    assert training["way"] == "scales" and training["development"][-1][1] < training["development"][0][1] - 0.05
    assert training["trained_parameters"] == 2 * sum(one.compressed().scales.numel() for one in packed_layers(before.model).values())
    changed = False
    for name, one in packed_layers(after.model).items():
        assert torch.equal(one.compressed().codes, codes[name]) and one.grid == Grid(3, 32)
        changed |= not torch.equal(one.compressed().scales, packed_layers(before.model)[name].compressed().scales)
    assert changed
    for name, one in after.model.named_parameters():
        assert torch.equal(one, plain[name]), f"{name} is no scale"
    again = compress(load(str(model_folder())), recipe)
    for ours, theirs in zip(after.model.buffers(), again.model.buffers()):
        assert torch.equal(ours, theirs)


def test_a_mask_stays(model_folder, step):
    recipe = [{"pass": "joint", "bits": 4, "group_size": 32, "sparsity": 0.5}, step | {"train": "scales"}]
    subject = compress(load(str(model_folder())), recipe, Calibration(samples=4, length=64))
    for one in packed_layers(subject.model).values():
        assert mask_of(one).float().mean() <= 0.5


def test_without_a_grid_it_is_refused(model_folder, step):
    with pytest.raises(UserError, match="recipe.0.: pass 'finetune' trains what lies beside codes, but no pass before it"):
        compress(load(str(model_folder())), [step | {"train": "scales"}])
    with pytest.raises(UserError, match="targets: .'q_proj'. is not allowed with train: scales"):
        compress(load(str(model_folder())), [{"pass": "rtn", "group_size": 32}, step | {"train": "scales", "targets": ["q_proj"]}])
