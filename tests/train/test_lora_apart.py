"""Adapters kept beside the codes: computed by every path, stored, loaded, counted, and refused where there is no place."""

import pytest
import torch

from qlib.compress import compress
from qlib.errors import UserError
from qlib.evaluate.footprint import measure_footprint
from qlib.evaluate.precision import in_float32
from qlib.layers import packed_layers
from qlib.layers.decode import Decoder
from qlib.models.load import load
from qlib.models.save import save

RTN = {"pass": "rtn", "bits": 4, "group_size": 32}


@pytest.fixture
def step(step):
    return step | {"train": "lora", "rank": 4, "merge": False, "peak_lr": 0.02}


@pytest.fixture
def adapted(model_folder, step):
    return compress(load(str(model_folder())), [RTN, step])


def test_codes_stay_and_the_adapter_is_added(model_folder, adapted):
    plain = compress(load(str(model_folder())), [RTN])
    layers, before = packed_layers(adapted.model), packed_layers(plain.model)
    assert adapted.details["training"][0]["merged"] is False and adapted.details["shape_format"] == "int4-g32+r4"
    for name, layer in layers.items():
        assert torch.equal(layer.compressed().codes, before[name].compressed().codes)
        assert torch.equal(layer.compressed().scales, before[name].compressed().scales)
        product = layer.adapter_up.double() @ layer.adapter_down.double()
        assert product.abs().max() > 0
        wanted = before[name].compressed().dequantize().double() + product
        assert (layer.effective_weight().double() - wanted).abs().max() < 1e-6
        bias = 0 if layer.bias is None else layer.bias.double()
        for rows in (1, 3, 300):  # the kernels of one row, of few and of many, and the exact path
            x = torch.randn(rows, layer.in_features, generator=torch.Generator().manual_seed(rows))
            exact = x.bfloat16().double() @ wanted.t() + bias
            assert (layer(x.bfloat16()).double() - exact).norm() < 0.02 * exact.norm()
            assert (layer(x.bfloat16().float()).double() - exact).norm() < 1e-5 * exact.norm()


def test_every_way_to_run_the_model_knows_of_it(adapted):
    ids = torch.arange(40)[None]
    with torch.no_grad():
        with in_float32(adapted.model) as model:
            exact = model(ids).logits
        plain = adapted.model(ids).logits[0, -1]
        decoded = Decoder(adapted.model, 64)(ids[0])
        single = [Decoder(adapted.model, 64)]
        for token in ids[0]:
            last = single[0](token[None])
    for found in (plain, decoded, last):
        assert (found.float() - exact[0, -1]).norm() < 0.05 * exact[0, -1].norm()
    learned = adapted.details["training"][0]["development"]
    assert learned[-1][1] < learned[0][1] - 0.1


def test_it_is_stored_loaded_and_counted(adapted, tmp_path):
    sizes = save(adapted, tmp_path / "saved")
    again = load(str(tmp_path / "saved"))
    for ours, theirs in zip(adapted.model.buffers(), again.model.buffers(), strict=True):
        assert torch.equal(ours, theirs)
    assert save(again, tmp_path / "twice") == sizes
    numbers = 4 * sum(one.in_features + one.out_features for one in packed_layers(adapted.model).values())
    with_them = measure_footprint(adapted.model)
    for layer in packed_layers(adapted.model).values():
        layer.adapter_down = layer.adapter_up = None
    without = measure_footprint(adapted.model)
    weights = sum(one.in_features * one.out_features for one in packed_layers(adapted.model).values())
    assert with_them["size.resident_bytes"]["value"] - without["size.resident_bytes"]["value"] == 2 * numbers
    more = with_them["size.bits_per_weight"]["value"] - without["size.bits_per_weight"]["value"]
    assert more == pytest.approx(16 * numbers / weights)
    disk = save(adapted, tmp_path / "without")["size.disk_bytes"].value
    assert 2 * numbers <= sizes["size.disk_bytes"].value - disk < 2 * numbers + 4096


def test_other_formats(adapted, tmp_path):
    for format in ("gptq", "compressed_tensors", "gguf"):
        with pytest.raises(UserError, match=f"{format}: .* has an adapter beside its codes"):
            save(adapted, tmp_path / format, format)
    save(adapted, tmp_path / "dense", "dense")
    dense = load(str(tmp_path / "dense")).model.get_submodule("model.layers.0.mlp.up_proj").weight
    assert torch.equal(dense, adapted.model.model.layers[0].mlp.up_proj.effective_weight().bfloat16())


def test_where_it_cannot_be(model_folder, step, adapted, tmp_path):
    folder = str(model_folder())
    with pytest.raises(UserError, match="recipe.0.: pass 'finetune' trains what lies beside codes"):
        compress(load(folder), [step])
    with pytest.raises(UserError, match="merge: false is not allowed with train: full"):
        compress(load(folder), [RTN, step | {"train": "full"}])
    with pytest.raises(UserError, match="merge: false would fill what was pruned of model.layers.0"):
        compress(load(folder), [{"pass": "magnitude"}, RTN, step])
    with pytest.raises(UserError, match="has adapters beside its codes, which would be lost"):
        compress(load(folder), [RTN, step, step | {"merge": True}])
    save(adapted, tmp_path / "saved")
    with pytest.raises(UserError, match="recipe.0.*has adapters beside its codes"):
        compress(load(str(tmp_path / "saved")), [step])
