"""Recipes: applied as told, refused when they cannot work, with nothing changed."""

import pytest
import torch

from qlib.compress import compress
from qlib.errors import UserError
from qlib.layers import packed_layers
from qlib.models.load import load
from qlib.params import Calibration
from qlib.prune.mask import mask_of
from qlib.quantize import rtn
from qlib.recipe import find_pass, pass_names, read_recipe


def test_every_linear_of_every_block_is_rounded_and_nothing_else(model_folder):
    folder = str(model_folder())
    original, subject = load(folder).model, compress(load(folder), [{"pass": "rtn", "bits": 4, "group_size": 32}])
    packed = packed_layers(subject.model)
    assert len(packed) == 14 and "lm_head" not in packed
    for name, layer in packed.items():
        expected = rtn.solve(original.get_submodule(name).weight, rtn.Options(4, 32))
        assert torch.equal(layer.compressed().codes, expected.codes)
    kept = dict(original.named_parameters())
    for name, parameter in subject.model.named_parameters():
        assert torch.equal(parameter, kept[name])
    errors = [layer["error"] for layer in subject.details["layers"]]
    assert len(errors) == 14 and all(0 < error < 0.2 for error in errors)
    assert subject.details["shape_format"] == "int4-g32" and subject.measurements["compress.seconds"].value > 0


@pytest.mark.parametrize(
    "recipe, words",
    [
        ([], "recipe: is empty"),
        ([{"bits": 4}], "recipe[0]: has no 'pass'"),
        ([{"pass": "rtm"}], "pass 'rtm' is unknown (did you mean 'rtn'?)"),
        ([{"pass": "rtn", "bit": 4}], "recipe[0].bit: unknown option of pass 'rtn' (did you mean 'bits'?)"),
        ([{"pass": "rtn", "group_size": 128}], "128 does not divide the 64 input channels of self_attn.q_proj; allowed here: 32, 64, null"),
        ([{"pass": "rtn", "group_size": 32}] * 2, "only one of them can"),
        ([{"pass": "rtn", "element": "fp8"}], "recipe[0].bits: 4 is not allowed with element fp8; allowed: 8"),
        ([{"pass": "rtn", "element": "fp8", "bits": 8}], "group_size: 128 is not allowed with fp8; allowed: null, tensor"),
        ([{"pass": "rtn", "activations": "int8"}], "activations: int8 is allowed only with bits 8, group_size null, symmetric"),
        ([{"pass": "awq"}], "recipe[0]: pass 'awq' prepares for a grid, but none follows"),
        ([{"pass": "magnitude"}, {"pass": "rotate"}], "recipe[1]: pass 'rotate' would fill what was pruned"),
        ([{"pass": "rtn", "element": "mxfp4"}, {"pass": "finetune"}], "recipe[1]: pass 'finetune' works on plain integer grids, not on mxfp4"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_changes(model_folder, recipe, words):
    subject = load(str(model_folder()))
    with pytest.raises(UserError) as caught:
        compress(subject, recipe)
    assert words in str(caught.value) and not packed_layers(subject.model)


def test_a_packed_model_is_not_rounded_again(model_folder):
    recipe = [{"pass": "rtn", "bits": 4, "group_size": 32}]
    with pytest.raises(UserError, match="needs float weights, but the model is already packed"):
        compress(compress(load(str(model_folder())), recipe), recipe)


def test_passes_are_found_by_name():
    assert pass_names()["rtn"] == "qlib.quantize.rtn" and "grid" not in pass_names()
    assert find_pass("rtn") is rtn
    module, options = read_recipe([{"pass": "rtn", "bits": 8, "group_size": None}])[0]
    assert module is rtn and options == rtn.Options(8, None)


def test_the_seed_of_the_caller_is_left_alone(model_folder):
    folder, state = str(model_folder()), torch.get_rng_state()
    compress(load(folder), [{"pass": "rtn", "bits": 4, "group_size": 32}], seed=5)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_one_pass_pruned_is_known_to_be_pruned_after_the_next_has_rounded_it(model_folder):
    rtn_2_bits = {"pass": "rtn", "bits": 2, "group_size": 32}
    subject = compress(load(str(model_folder())), [{"pass": "magnitude", "sparsity": 0.5}, rtn_2_bits])
    for layer in packed_layers(subject.model).values():
        assert (~mask_of(layer)).float().mean() >= 0.5


def test_linears_that_read_the_same_inputs_come_out_as_they_would_alone(model_folder, monkeypatch):
    recipe, found = [{"pass": "gptq", "bits": 3, "group_size": 32}], []
    for together in (True, False):
        if not together:
            monkeypatch.delattr(find_pass("gptq"), "TOGETHER")
        subject = compress(load(str(model_folder())), recipe, Calibration(samples=4, length=32))
        found.append({name: layer.compressed().dequantize() for name, layer in packed_layers(subject.model).items()})
    for name, weight in found[0].items():
        torch.testing.assert_close(weight, found[1][name])
