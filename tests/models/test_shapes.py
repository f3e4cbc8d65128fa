"""Shapes give the parameter counts that the models' own files have."""

import json

import pytest

from qlib import paths
from qlib.errors import UserError
from qlib.models import shapes
from qlib.models.shapes import SHAPES, Shape, find_shape, layer_config

#: Totals of the published safetensors files.
PUBLISHED = {
    "qwen-72b": 72_287_920_128,
    "qwen2.5-72b": 72_706_203_648,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-0.5b": 494_032_768,
}
TINY = Shape("tiny", 2, 64, 3, 1, 96, 100, tied=True, head_dim=32)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
    assert find_shape(name).parameters == PUBLISHED[name]


def test_a_qwen_72b_layer():
    shape = find_shape("qwen-72b")
    assert shape.layer_parameters == 872_456_192
    assert 2 * shape.layers * shape.kv_elements == 2_621_440  # bytes of bf16 cache per token


def test_every_published_model_is_known():
    assert set(SHAPES) == set(PUBLISHED)


@pytest.mark.parametrize("tied", (True, False))
def test_counts_agree_with_the_real_module(tied):
    from dataclasses import replace

    from transformers import Qwen2ForCausalLM

    shape = replace(TINY, tied=tied)
    model = Qwen2ForCausalLM(layer_config(shape, layers=shape.layers))
    assert sum(p.numel() for p in model.parameters()) == shape.parameters
    layer = model.model.layers[0]
    assert {name: tuple(layer.get_submodule(name).weight.shape) for name in shape.linears} == shape.linears
    assert sum(p.numel() for p in layer.parameters()) == shape.layer_parameters
    assert model.config.rope_parameters["rope_theta"] == shape.theta


def test_the_reference_model_is_read_from_its_configuration(tmp_path, monkeypatch):
    from dataclasses import replace

    for module in (shapes, paths):
        monkeypatch.setattr(module, "MODELS", tmp_path)
    with pytest.raises(UserError, match="no true shape is known for 'reference-2'"):
        find_shape("reference-2")
    path = tmp_path / "reference-2" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(layer_config(TINY, layers=2).to_dict(), default=str))
    assert find_shape("reference-2") == find_shape("reference") == replace(TINY, name="reference-2")


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"'qwen72b' \(did you mean 'qwen-72b'\?\)"):
        find_shape("qwen72b")
