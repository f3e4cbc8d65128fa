"""The pass: what it refuses, that the setting is saved, and that quality is measured through the cache."""

import pytest
import torch

from qlib.compress import compress
from qlib.errors import UserError
from qlib.evaluate.logits import ModelLogits
from qlib.evaluate.precision import in_float32
from qlib.layers import packed_layers
from qlib.models.load import load
from qlib.models.save import save

PASS = {"pass": "kv_cache", "bits": 4}
RTN = {"pass": "rtn", "bits": 4, "group_size": 32}
IDS = torch.randint(1, 300, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "given, words",
    [
        ({"bits": 3}, "recipe[0].bits: 3 is not allowed; allowed: 8, 4"),
        ({"group_size": 32}, "recipe[0].group_size: 32 does not divide the 16 channels of a head; allowed here: null"),
    ],
)
def test_refusals(model_folder, given, words):
    with pytest.raises(UserError) as caught:
        compress(load(str(model_folder())), [PASS | given])
    assert str(caught.value) == words


@pytest.mark.parametrize("recipe", [[PASS], [PASS, RTN], [RTN, PASS]], ids=["alone", "before", "after"])
@pytest.mark.parametrize("format", ["packed", "dense"])
def test_the_setting_comes_back_and_no_weight_changes(model_folder, tmp_path, recipe, format):
    subject, expected = (load(str(model_folder(name=name))) for name in ("model", "same"))
    subject = compress(subject, recipe)
    if RTN in recipe:
        expected = compress(expected, [RTN])
    assert subject.model.state_dict().keys() == expected.model.state_dict().keys()
    for name, tensor in expected.model.state_dict().items():
        assert torch.equal(tensor, subject.model.state_dict()[name])
    sizes = save(subject, tmp_path / "saved", format)
    again = load(str(tmp_path / "saved"))
    assert again.model.config.kv_cache == again.config.kv_cache == {"bits": 4, "group_size": None}
    assert len(packed_layers(again.model)) == (14 if RTN in recipe and format == "packed" else 0)
    if format == "packed" or RTN not in recipe:
        with torch.no_grad():
            assert torch.equal(ModelLogits(subject.model)(IDS, 12), ModelLogits(again.model)(IDS, 12))
    assert sizes["size.kv_bytes_per_token"]["value"] == 2 * 2 * 2 * (8 + 4)  # layers, keys and values, heads


def test_quality_is_measured_through_the_cache_with_shared_contexts_too(model_folder):
    plain, subject = load(str(model_folder())), compress(load(str(model_folder())), [PASS])
    assert ModelLogits(plain.model)(IDS, 3).shape == (2, 3, 300)
    contexts, options = IDS[:, :6], IDS[:, 6:].unflatten(1, (2, 3))
    with torch.inference_mode(), in_float32(subject.model), in_float32(plain.model):
        logits_of = ModelLogits(subject.model)
        first, rest = logits_of.branches(contexts, options)
        for index in range(2):
            whole = logits_of(torch.cat([contexts, options[:, index, :-1]], 1), 3)
            found = torch.cat([first[:, None], rest[:, index]], 1)
            assert torch.allclose(whole, found, atol=1e-5)
        assert (logits_of(IDS, 12) - ModelLogits(plain.model)(IDS, 12)).abs().max() > 1e-4


def test_the_bytes_of_an_ordinary_cache_are_measured_too(model_folder, tmp_path):
    found = save(load(str(model_folder())), tmp_path / "saved")["size.kv_bytes_per_token"]
    assert found["value"] == 2 * 2 * 2 * 16 * 2 and "filled" in found["method"]
