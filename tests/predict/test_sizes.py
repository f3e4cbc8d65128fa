"""Sizes by arithmetic are those of files that were written and of models that were loaded, to the byte."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qlib.compress import compress
from qlib.errors import UserError
from qlib.evaluate.footprint import shape_footprint
from qlib.layers import int2
from qlib.layers.int2 import Int2Linear
from qlib.layers.int4 import Int4Linear
from qlib.layers.packing import layer_class
from qlib.models.load import load
from qlib.models.save import save
from qlib.models.shapes import SHAPES, find_shape
from qlib.predict.anatomy import read_anatomy
from qlib.predict.experience import outcome_of
from qlib.predict.sizes import cache_bytes_per_token, checkpoint_layout, disk_bytes, model_bytes
from qlib.quantize.grid import Grid

ROOT = Path(__file__).parents[2]
RECORDS = sorted((ROOT / "reports" / "published" / "records").glob("*/record.json"))
#: Of a mask and codes: what rounds to 0 is left out, so that the bytes are an upper bound. As shares of what they are.
SLACK = 1.02


def published():
    for file in RECORDS:
        record = json.loads(file.read_text())
        if "size.disk_bytes" in record["measurements"] and record["family"] != "tool":
            yield pytest.param(record, id=record["name"])


@pytest.mark.parametrize("record", published())
def test_every_published_strategy_has_the_bytes_that_are_predicted(record, monkeypatch):
    outcome = outcome_of(read_anatomy(record["model"]), record["params"]["recipe"])
    names = ("disk_bytes", "resident_bytes", "kv_bytes_per_token")
    disk, held, cache = (record["measurements"][f"size.{name}"]["value"] for name in names)
    assert cache_bytes_per_token(outcome) == cache
    if outcome.unknown:
        assert "chosen by measuring" in outcome.unknown
        return
    monkeypatch.setattr(int2, "runs_here", lambda: True)  # as where they were measured; elsewhere codes of 2 bits take 4
    assert held == model_bytes(outcome)
    if outcome.bound:
        assert disk / SLACK <= disk_bytes(outcome) <= disk * SLACK
    else:
        assert disk_bytes(outcome) == disk


ARCHITECTURES = ("qwen2", "qwen3", "llama", "mistral")
GROUP = {"bits": 4, "group_size": 32}
RECIPES = {
    "plain": [],
    "int4": [{"pass": "rtn"} | GROUP],
    "pruned": [{"pass": "magnitude", "sparsity": 0.7}],
    "4:8": [{"pass": "magnitude", "pattern": "4:8"}],
    "ends": [{"pass": "rtn"} | GROUP, {"pass": "ends"}],
    "tensor fp8": [{"pass": "rtn", "element": "fp8", "bits": 8, "group_size": "tensor"}],
    "keep_ends": [{"pass": "keep_ends", "budget": 4.0, "group_size": 32}, {"pass": "rtn"} | GROUP],
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("tied", [False, True])
def test_every_architecture_is_saved_with_the_bytes_that_are_predicted(model_folder, kind, tied, recipe):
    folder = model_folder(kind, tied)
    outcome, subject = outcome_of(read_anatomy(str(folder)), recipe), load(str(folder))
    sizes = save(compress(subject, recipe) if recipe else subject, folder / "out")
    assert disk_bytes(outcome) == sizes["size.disk_bytes"].value
    assert model_bytes(outcome) == sizes["size.resident_bytes"]["value"]
    assert cache_bytes_per_token(outcome) == sizes["size.kv_bytes_per_token"]["value"]


@pytest.mark.parametrize("name", ["qwen-72b", "qwen2.5-0.5b"])
def test_sizes_of_true_shapes_are_those_of_the_speed_records(name):
    shape = find_shape(name)
    recipes = {"bf16": [], "int4-g128": [{"pass": "gptq"}], "int8": [{"pass": "rtn", "bits": 8, "group_size": None}]}
    for format, recipe in recipes.items():
        outcome, sizes = outcome_of(read_anatomy(name), recipe), shape_footprint(shape, format)
        data = sum(dtype.itemsize * size.numel() for dtype, size in _tensors(outcome))
        assert data == sizes["size.disk_bytes"]["value"]
        assert model_bytes(outcome) - outcome.anatomy.buffers == sizes["size.resident_bytes"]["value"]
        assert data < disk_bytes(outcome) < data + 10**6  # the headers of all files


def test_two_bits_take_the_bytes_of_four_where_no_kernel_of_ours_runs():
    outcome = outcome_of(read_anatomy("qwen2.5-0.5b"), [{"pass": "rtn", "bits": 2}])
    saved = outcome.anatomy.layers * outcome.anatomy.linear_weights // 4 if Int2Linear.fits(Grid(2, 128), 896, 896) else 0
    assert saved or layer_class(Grid(2, 128), 896, 896) is Int4Linear
    assert model_bytes(outcome, "cuda") - model_bytes(outcome) == saved


def _tensors(outcome):
    import torch

    return [(dtype, torch.Size(size)) for dtype, size in checkpoint_layout(outcome).values()]


def test_narrow_and_short_models():
    shape = SHAPES["qwen2.5-0.5b"]
    short = outcome_of(read_anatomy(shape), [{"pass": "depth", "keep_layers": 0.5}])
    assert len(short.held) == 12 and model_bytes(short) - short.anatomy.buffers == 2 * replace(shape, layers=12).parameters
    narrow = outcome_of(read_anatomy(shape), [{"pass": "width", "keep_heads": 1.0, "keep_ffn": 0.5}])
    assert model_bytes(narrow) - narrow.anatomy.buffers == 2 * shape.narrowed(1.0, 0.5).parameters


def test_an_original_qwen_counts_as_the_qwen2_it_becomes(tmp_path):
    config = {
        "model_type": "qwen", "vocab_size": 152064, "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64,
        "intermediate_size": 49152, "seq_length": 32768, "rotary_emb_base": 1000000, "use_dynamic_ntk": False,
        "use_logn_attn": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert model_bytes(outcome_of(read_anatomy(str(tmp_path)), [])) == model_bytes(outcome_of(read_anatomy("qwen-72b"), []))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"hidden_size": None}, "config.json: hidden_size: None is not allowed; allowed: a whole number above 0"),
        ({"num_hidden_layers": ...}, "config.json: num_hidden_layers: is missing; allowed: a whole number above 0"),
        ({"model_type": "qwen22"}, "model_type: 'qwen22' is not supported (did you mean 'qwen2'?)"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method: 'gptq' is compressed already"),
    ],
)
def test_what_a_configuration_lacks_is_named(tmp_path, changes, words):
    config = {"model_type": "qwen2", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 128}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    config = {name: value for name, value in (config | changes).items() if value is not ...}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as error:
        read_anatomy(str(tmp_path))
    assert words in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_model_is_refused_with_the_nearest_name():
    with pytest.raises(UserError, match=r"model: 'qwen72b' is unknown \(did you mean 'qwen-72b'\?\)"):
        read_anatomy("qwen72b")
