"""Round-to-nearest as a pass: its statistic in float64, masks in every format, and what importance is for."""

import pytest
import torch

from qlib.errors import UserError
from qlib.quantize import rtn
from qlib.recipe import read_recipe

FORMATS = [
    {"bits": 4}, {"bits": 3, "symmetric": True}, {"bits": 8, "group_size": None, "symmetric": True},
    {"bits": 8, "element": "fp8", "group_size": None}, {"bits": 8, "element": "fp8", "group_size": "tensor"},
    {"element": "mxfp4"}, {"element": "nvfp4"},
]  # fmt: skip


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fed(inputs, options):
    statistic = rtn.Statistic(inputs.shape[1], options)
    for part in inputs.split([1, 50, len(inputs) - 51]):
        statistic.feed(part)
    return statistic


def test_the_statistic_is_the_mean_square_of_every_channel_however_they_come():
    inputs = (draw(300, 128) * torch.logspace(-4, 4, 128)).bfloat16()
    statistic = fed(inputs, rtn.Options(clip="activations"))
    torch.testing.assert_close(statistic.squares.double(), inputs.double().square().mean(0), rtol=1e-6, atol=0)
    statistic.free()
    assert statistic.squares is None
    assert [rtn.feeds(rtn.Options(clip=how)) for how in ("none", "mse", "activations")] == [False, False, True]


@pytest.mark.parametrize("options", FORMATS, ids=str)
@pytest.mark.parametrize("how", ("none", "mse", "activations"))
def test_what_was_pruned_stays_zero_in_every_format(options, how):
    options = rtn.Options(**options, clip=how)
    weight, mask = draw(16, 256) + 0.2, draw(16, 256, seed=1) > 0
    mask[3, :128] = False  # a group of which nothing is left
    rounded = rtn.solve(weight, options, mask, fed(draw(100, 256, seed=2), options)).dequantize()
    assert (rounded[~mask] == 0).all() and rounded.isfinite().all()
    assert (rounded - weight)[mask].norm() < 0.3 * weight[mask].norm()
    whole = rtn.solve(weight * mask, options, None, fed(draw(100, 256, seed=2), options)).dequantize()
    assert torch.equal(rounded, whole)


@pytest.mark.parametrize("options", [{"bits": bits} for bits in (2, 3, 4)] + FORMATS[-2:], ids=str)
def test_importance_serves_the_outputs(options):
    """With independent channels, the expected error of the outputs is the weighted error of the weights."""
    weight, inputs = draw(64, 256), draw(4000, 256, seed=1) * torch.logspace(-1, 1, 256).view(2, 128).T.flatten()

    def error(how):
        chosen = rtn.Options(**options, clip=how)
        rounded = rtn.solve(weight, chosen, statistic=fed(inputs, chosen)).dequantize()
        return (inputs.double() @ (rounded - weight).double().T).square().mean().item()

    assert error("activations") < error("mse")


def test_importance_without_text_is_refused():
    with pytest.raises(UserError, match="^calibration: "):
        rtn.solve(draw(4, 128), rtn.Options(clip="activations"))
    [(module, options)] = read_recipe([{"pass": "rtn", "element": "mxfp4", "clip": "mse"}])
    assert module is rtn and options.grid.name == "mxfp4"
