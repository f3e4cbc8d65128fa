"""What is saved comes back bit by bit, whole or not at all, at the size that is reported."""

import pytest
import torch

from qlib.compress import compress
from qlib.errors import UserError
from qlib.layers import packed_layers
from qlib.models.families import blocks_of, linears_of
from qlib.models.load import load
from qlib.models.save import save
from qlib.params import Calibration
from qlib.prune.mask import is_pruned

RECIPES = {
    "int4": {"pass": "rtn", "bits": 4, "group_size": 32},
    "int8": {"pass": "rtn", "bits": 8, "group_size": None, "symmetric": True},
    "int3": {"pass": "rtn", "bits": 3, "group_size": 64},
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("tied", (False, True))
def test_packed_checkpoints_come_back_bit_by_bit(model_folder, tmp_path, recipe, tied):
    subject = compress(load(str(model_folder(tied=tied))), [recipe])
    save(subject, tmp_path / "saved")
    again = load(str(tmp_path / "saved"))
    before, after = packed_layers(subject.model), packed_layers(again.model)
    assert list(before) == list(after) and len(before) == 14
    for name, layer in before.items():
        for part in ("codes", "scales", "zeros"):
            ours, theirs = (getattr(x.compressed(), part) for x in (layer, after[name]))
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(subject.model(ids).logits, again.model(ids).logits)
    assert (again.model.lm_head.weight is again.model.model.embed_tokens.weight) == tied


def test_dense_checkpoints_load_in_plain_transformers(model_folder, tmp_path):
    from transformers import AutoModelForCausalLM

    subject = compress(load(str(model_folder())), [RECIPES["int4"]])
    save(subject, tmp_path / "dense", format="dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    for name, layer in packed_layers(subject.model).items():
        assert torch.equal(dense.get_submodule(name).weight, layer.compressed().dequantize().bfloat16())


def test_the_reported_size_is_that_on_disk_and_a_tied_head_is_stored_once(model_folder, tmp_path):
    sizes = {}
    for tied in (False, True):
        subject = load(str(model_folder(tied=tied, name=f"model-{tied}")))
        sizes[tied] = save(subject, tmp_path / "saved")["size.disk_bytes"].value
        assert sizes[tied] == sum(file.stat().st_size for file in (tmp_path / "saved").glob("*.safetensors"))
    assert abs(sizes[False] - sizes[True] - 2 * 300 * 64) < 200  # one embedding in bf16, but for the header


def test_int4_takes_a_quarter_and_a_bit(model_folder, tmp_path):
    subject = compress(load(str(model_folder())), [RECIPES["int4"]])
    sizes = save(subject, tmp_path / "saved")
    assert sizes["size.bits_per_weight"]["value"] == 4 + (16 + 4) / 32


def test_an_interrupted_save_leaves_nothing(model_folder, tmp_path, monkeypatch):
    subject = load(str(model_folder()))
    monkeypatch.setattr(subject.tokenizer, "save_pretrained", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save(subject, tmp_path / "saved")
    assert not list(tmp_path.glob("saved*"))


def test_unknown_format(model_folder, tmp_path):
    with pytest.raises(UserError, match="format: 'onnx' is unknown; allowed: packed, dense, gptq"):
        save(load(str(model_folder())), tmp_path / "saved", format="onnx")


def test_a_file_for_llama_cpp_takes_the_place_of_safetensors(model_folder, tmp_path):
    subject = compress(load(str(model_folder())), [{"pass": "rtn", "bits": 4, "group_size": 32, "symmetric": True}])
    sizes = save(subject, tmp_path / "gguf", "gguf")
    assert [file.name for file in (tmp_path / "gguf").iterdir()] == ["model.gguf"]
    assert sizes["size.disk_bytes"].value == (tmp_path / "gguf" / "model.gguf").stat().st_size
    assert sizes["size.bits_per_weight"].value == 4.5


PRUNED = {
    "bf16": [{"pass": "magnitude", "sparsity": 0.6}],
    "one after the other": [{"pass": "magnitude", "sparsity": 0.6}, {"pass": "rtn", "bits": 4, "group_size": 32}],
    "joint": [{"pass": "joint", "bits": 4, "group_size": 32, "sparsity": 0.6}],
    "2:4, 3 bits": [{"pass": "joint", "bits": 3, "group_size": 64, "pattern": "2:4"}],
    "hardly": [{"pass": "magnitude", "sparsity": 0.01}],
}


@pytest.mark.parametrize("recipe", PRUNED.values(), ids=PRUNED)
def test_pruned_checkpoints_come_back_bit_by_bit_at_the_size_that_is_told(model_folder, tmp_path, recipe):
    subject = compress(load(str(model_folder())), recipe, Calibration(samples=4, length=64))
    sizes = save(subject, tmp_path / "saved")
    again = load(str(tmp_path / "saved"))
    for (name, ours), theirs in zip(subject.model.named_modules(), again.model.modules(), strict=True):
        assert type(ours) is type(theirs) and is_pruned(ours) == is_pruned(theirs)
        for (part, one), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
            assert torch.equal(one, other), f"{name}.{part}"
    assert sum(map(is_pruned, again.model.modules())) == 14
    plain = save(load(str(model_folder())), tmp_path / "plain")["size.disk_bytes"].value
    weights = sum(2 * l.in_features * l.out_features for b in blocks_of(again.model) for l in linears_of(again.model, b).values())
    told = plain - weights + weights / 16 * sizes["size.bits_per_weight"]["value"]
    assert abs(sizes["size.disk_bytes"].value - told) < 4096  # headers name more tensors, or fewer
    assert (sizes["size.disk_bytes"].value < 0.8 * plain) == (recipe is not PRUNED["hardly"])
    assert save(again, tmp_path / "twice") == sizes


def test_a_pruned_checkpoint_with_a_spoilt_mask_is_refused(model_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    save(compress(load(str(model_folder())), PRUNED["bf16"]), tmp_path / "saved")
    file = tmp_path / "saved" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("q_proj.mask"))
    save_file(tensors | {name: tensors[name] ^ 1}, file)
    with pytest.raises(UserError, match=r"q_proj.*'mask' of a pruned weight .* expected"):
        load(str(tmp_path / "saved"))


def test_other_formats_keep_the_zeros(model_folder, tmp_path):
    from transformers import AutoModelForCausalLM

    subject = compress(load(str(model_folder())), PRUNED["bf16"])
    save(subject, tmp_path / "dense", format="dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    ours = blocks_of(subject.model)[0].mlp.up_proj.weight
    assert torch.equal(dense.model.layers[0].mlp.up_proj.weight, ours) and 0.55 < (ours == 0).float().mean() < 0.65
