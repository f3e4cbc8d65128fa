"""Embedding and head in 8 bits: their codes against float64, shared where they were shared, saved once."""

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qlib.compress import compress
from qlib.errors import UserError
from qlib.evaluate.footprint import measure_footprint
from qlib.evaluate.logits import ModelLogits
from qlib.evaluate.precision import in_float32
from qlib.models.families import is_tied
from qlib.models.load import load
from qlib.models.packed import coded_modules
from qlib.models.save import save

ENDS, RTN = {"pass": "ends"}, {"pass": "rtn", "bits": 4, "group_size": 32}
IDS = torch.randint(1, 300, (2, 12), generator=torch.Generator().manual_seed(0))
WEIGHTS = 300 * 64  # of an embedding
CASES = [(True, "both"), (False, "both"), (False, "embedding"), (False, "head")]


def scored(model):
    with torch.inference_mode(), in_float32(model):
        return ModelLogits(model)(IDS, 12)


@pytest.mark.parametrize("tied, which", CASES)
def test_the_scorer_sees_the_rounded_weights_and_nothing_else(model_folder, tied, which):
    folder = str(model_folder(tied=tied))
    plain, subject = load(folder).model.float(), compress(load(folder), [ENDS | {"which": which}])
    for name, end in (("embedding", plain.model.embed_tokens), ("head", plain.lm_head)):
        if which in ("both", name) and not (tied and name == "head"):
            weight = end.weight.detach().double().numpy()
            scales = torch.tensor(2 * np.abs(weight).max(1) / 255).bfloat16().double().numpy()[:, None]
            codes = np.clip(np.rint(weight / scales), -128, 127)
            end.weight = torch.nn.Parameter(torch.tensor(codes * scales).float())
            if tied:
                plain.lm_head.weight = end.weight
    with torch.inference_mode():
        assert torch.allclose(scored(subject.model), plain(IDS).logits, atol=1e-5)
        assert subject.model(IDS).logits.dtype == torch.bfloat16
        assert (subject.model(IDS).logits - plain(IDS).logits).abs().max() < 0.05
    assert is_tied(subject.model) == tied


@pytest.mark.parametrize("recipe", [[ENDS], [RTN, ENDS], [ENDS, RTN]], ids=["alone", "after", "before"])
@pytest.mark.parametrize("tied, which", CASES)
def test_what_is_saved_comes_back_bit_by_bit(model_folder, tmp_path, recipe, tied, which):
    recipe = [step | {"which": which} if step is ENDS else step for step in recipe]
    subject = compress(load(str(model_folder(tied=tied))), recipe)
    sizes = save(subject, tmp_path / "saved")
    again = load(str(tmp_path / "saved"))
    before, after = coded_modules(subject.model), coded_modules(again.model)
    ends = 2 if which == "both" and not tied else 1
    assert before.keys() == after.keys() and len(before) == ends + (14 if RTN in recipe else 0)
    for name, module in before.items():
        for part in ("codes", "scales", "zeros"):
            ours, theirs = (getattr(one.compressed(), part) for one in (module, after[name]))
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    assert is_tied(again.model) == tied
    with torch.no_grad():
        assert torch.equal(subject.model(IDS).logits, again.model(IDS).logits)
    assert measure_footprint(again.model)["size.resident_bytes"] == sizes["size.resident_bytes"]


@pytest.mark.parametrize("tied, copies", [(True, 1), (False, 2)])
def test_sizes_are_those_of_the_arithmetic_and_shared_codes_count_once(model_folder, tmp_path, tied, copies):
    plain = load(str(model_folder(tied=tied)))
    before, total = measure_footprint(plain.model), sum(p.numel() for p in plain.model.parameters())
    subject = compress(plain, [ENDS])
    found = save(subject, tmp_path / "saved")
    saved = copies * (2 * WEIGHTS - WEIGHTS - 2 * 300)  # bf16 before; codes and a scale for each row now
    assert before["size.resident_bytes"]["value"] - found["size.resident_bytes"]["value"] == saved
    assert found["size.bits_per_weight_total"]["value"] == pytest.approx(8 * (2 * total - saved) / total)
    assert found["size.bits_per_weight"]["value"] == 16
    tensors = load_file(tmp_path / "saved" / "model.safetensors")
    assert sum(tensor.nbytes for tensor in tensors.values()) == 2 * total - saved
    codes = ["lm_head.codes", "model.embed_tokens.codes"]
    assert [name for name in sorted(tensors) if name.endswith(".codes")] == codes[2 - copies :]


def test_a_dense_checkpoint_loads_in_plain_transformers(model_folder, tmp_path):
    from transformers import AutoModelForCausalLM

    subject = compress(load(str(model_folder(tied=True))), [ENDS])
    save(subject, tmp_path / "dense", "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    table = subject.model.get_input_embeddings().compressed().dequantize().bfloat16()
    assert torch.equal(dense.lm_head.weight, table) and is_tied(dense)


def test_codes_stay_shared_wherever_the_model_goes(model_folder, tmp_path):
    subject = compress(load(str(model_folder(tied=True))), [ENDS])
    save(subject, tmp_path / "saved")
    for model in (copy.deepcopy(subject.model).float(), load(str(tmp_path / "saved"), "meta").model):
        assert is_tied(model) and model.lm_head.codes is not subject.model.lm_head.codes


def test_refusals(model_folder):
    with pytest.raises(UserError, match=r"recipe\[0\]\.which: head is not allowed where head and embedding are one"):
        compress(load(str(model_folder(tied=True))), [ENDS | {"which": "head"}])
    once = compress(load(str(model_folder(name="other"))), [ENDS])
    with pytest.raises(UserError, match="in 8 bits already"):
        compress(once, [ENDS])


def test_shared_contexts_are_scored_in_fp32_without_a_float_embedding_too(model_folder):
    model = compress(load(str(model_folder(tied=True))), [RTN, ENDS]).model
    contexts, options = IDS[:, :6], IDS[:, 6:].unflatten(1, (2, 3))
    with torch.inference_mode(), in_float32(model):
        first, rest = ModelLogits(model).branches(contexts, options)
        for index in range(2):
            whole = ModelLogits(model)(torch.cat([contexts, options[:, index, :-1]], 1), 3)
            assert torch.allclose(whole, torch.cat([first[:, None], rest[:, index]], 1), atol=1e-5)


def test_after_a_rotation_both_are_packed_apart(model_folder):
    subject = compress(load(str(model_folder(tied=True))), [{"pass": "rotate"}, RTN, ENDS])
    assert not is_tied(subject.model) and len(coded_modules(subject.model)) == 16
