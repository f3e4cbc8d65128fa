"""Shares of sparsity: a global threshold by brute force, outliers by hand, and both in recipes."""

import pytest
import torch

from qlib.compress import compress
from qlib.errors import UserError
from qlib.models.families import blocks_of, linears_of
from qlib.models.load import load
from qlib.params import Calibration
from qlib.prune.allocate_sparsity import global_shares, outlier_shares
from qlib.prune.mask import mask_of

CALIBRATION = Calibration(samples=8, length=64)


def masks(subject) -> list[torch.Tensor]:
    return [mask_of(linear) for block in blocks_of(subject.model) for linear in linears_of(subject.model, block).values()]


def weights(subject) -> list[torch.Tensor]:
    return [l.weight.detach().clone() for block in blocks_of(subject.model) for l in linears_of(subject.model, block).values()]


def test_global_shares_equal_brute_force():
    random = torch.Generator().manual_seed(0)
    some = [torch.randn(5, 8, generator=random) * scale for scale in (0.1, 1.0, 3.0)]
    everything = sorted((abs(float(w)), index) for index, one in enumerate(some) for w in one.flatten())
    gone = [index for _, index in everything[:60]]
    assert global_shares(some, 0.5) == pytest.approx([gone.count(index) / 40 for index in range(3)])
    assert global_shares(some, 0.0) == [0, 0, 0]


def test_global_magnitude_is_one_threshold_for_all_linears(model_folder):
    before = weights(load(str(model_folder())))
    recipe = [{"pass": "allocate_sparsity", "by": "magnitude", "sparsity": 0.4}, {"pass": "magnitude", "sparsity": 0.4}]
    found = compress(load(str(model_folder())), recipe)  # no text is needed
    assert "compress.calibration_tokens" not in found.measurements
    kept = torch.cat([weight[mask].abs() for weight, mask in zip(before, masks(found))])
    gone = torch.cat([weight[~mask].abs() for weight, mask in zip(before, masks(found))])
    assert gone.max() <= kept.min() and len(gone) == pytest.approx(0.4 * (len(gone) + len(kept)), abs=len(before))
    assert found.details["sparsities"].keys() == {layer["name"] for layer in found.details["layers"]}


def test_more_outliers_keep_more_and_the_mean_stays():
    shares = outlier_shares([0.01, 0.03, 0.02, 0.01], 0.6, 0.08)
    assert sum(shares) / 4 == pytest.approx(0.6)
    assert max(shares) - min(shares) == pytest.approx(0.16) and min(shares) == shares[1]
    assert outlier_shares([0.02, 0.02], 0.5, 0.08) == [0.5, 0.5]


@pytest.mark.parametrize("name", ("wanda", "sparsegpt"))
def test_blocks_get_their_shares_from_outliers(model_folder, name):
    recipe = [{"pass": "allocate_sparsity", "far": 2.0}, {"pass": name}]
    found = compress(load(str(model_folder())), recipe, CALIBRATION)
    linears = len(found.details["sparsities"]) // len(found.details["outliers"])
    wanted = outlier_shares(found.details["outliers"], 0.5, 0.08)
    assert len(set(wanted)) > 1
    for index, mask in enumerate(masks(found)):
        assert (~mask).float().mean() == pytest.approx(wanted[index // linears], abs=0.02)


@pytest.mark.parametrize(
    "recipe, words",
    [
        ([{"pass": "allocate_sparsity"}], "recipe[0]: pass 'allocate_sparsity' chooses how much of each linear goes, but no pass"),
        ([{"pass": "allocate_sparsity"}, {"pass": "rtn"}], "but no pass that prunes follows"),
        ([{"pass": "allocate_sparsity"}, {"pass": "wanda", "pattern": "2:4"}], "a later pass has a pattern"),
        ([{"pass": "allocate_sparsity", "sparsity": 1.0}, {"pass": "wanda"}], "recipe[0].sparsity: 1.0 is not allowed"),
        ([{"pass": "allocate_sparsity", "sparsity": 0.9}, {"pass": "wanda"}], "spread: 0.08 is not allowed with sparsity 0.9; allowed: 0 to 0.05"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(model_folder, recipe, words):
    with pytest.raises(UserError) as caught:
        compress(load(str(model_folder())), recipe, CALIBRATION)
    assert words in str(caught.value)
