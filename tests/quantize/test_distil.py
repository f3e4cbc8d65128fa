"""Distillation on the calibration text: closer to the uncompressed model, on the same grid, repeatable."""

import importlib

import pytest
import torch

from qlib.errors import UserError
from qlib.evaluate.precision import in_float32
from qlib.layers import packed_layers
from qlib.models.load import load
from qlib.quantize.distil import Options, check
from qlib.train.finetune import distillation_loss

compress = importlib.import_module("qlib.compress")
RTN = {"pass": "rtn", "bits": 2, "group_size": 32}
DISTIL = {"pass": "distil", "epochs": 12, "batch": 2, "peak_lr": 2e-3}
IDS = torch.randint(1, 300, (8, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def tuned(monkeypatch, model_folder):
    monkeypatch.setattr(compress, "calibration_ids", lambda *told: list(IDS.split(4)))
    return lambda *steps, seed=0: compress.compress(load(str(model_folder())), list(steps), object(), seed)


def divergence(subject):
    models = subject.model, load(str(subject.source.folder)).model
    with torch.no_grad(), in_float32(models[0]), in_float32(models[1]):
        return distillation_loss(*(model(input_ids=IDS, use_cache=False).logits for model in models)).item()


def test_it_brings_predictions_closer_on_the_same_grid(tuned):
    before, after = tuned(RTN), tuned(RTN, DISTIL)
    assert divergence(after) < 0.8 * divergence(before)
    same = 0
    for (name, one), other in zip(packed_layers(after.model).items(), packed_layers(before.model).values()):
        assert one.grid == other.grid and torch.equal(one.compressed().zeros, other.compressed().zeros), name
        same += torch.equal(one.compressed().codes, other.compressed().codes)
    assert same < 14
    kept, found = dict(before.model.named_parameters()), dict(after.model.named_parameters())
    assert all(p.dtype == torch.bfloat16 and not p.requires_grad for p in found.values())
    learned = {name for name, p in found.items() if not torch.equal(p, kept[name])}
    assert learned and all(".layers." in name for name in learned), "embedding, last norm and head stay"


def test_a_mask_is_kept_and_the_same_seed_repeats(tuned):
    steps = ({"pass": "magnitude", "sparsity": 0.5}, RTN, DISTIL)
    state, first, again, other = torch.get_rng_state(), tuned(*steps), tuned(*steps), tuned(*steps, seed=1)
    for layer in packed_layers(first.model).values():
        assert (layer.compressed().dequantize() == 0).float().mean() >= 0.5
    ours, theirs, others = (dict(one.model.state_dict()) for one in (first, again, other))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert any(not torch.equal(tensor, others[name]) for name, tensor in ours.items())
    assert torch.equal(torch.get_rng_state(), state)


def test_what_cannot_work_is_refused(tuned):
    with pytest.raises(UserError, match="'distil' tunes weights on a grid"):
        tuned(DISTIL)
    for wrong in ({"epochs": 0}, {"batch": 0}, {"peak_lr": 0.0}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            check(None, Options(**wrong))
