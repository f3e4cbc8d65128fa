"""What tells whether a tool got a fair run: hashes of ids, runtimes, repeats; with an adapter that is made up here."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from qlib.evaluate.items import build_items
from qlib.evaluate.logits import ModelLogits
from qlib.evaluate.quality import score_items
from qlib.models.load import load
from qlib.quantize.tool import Options
from qlib.tools import fairness
from qlib.tools.adapter import Quantized
from qlib.tools.runtime import ModuleRuntime, RuntimeModel
from qlib.tools.witness import Witness, hash_rows


@pytest.fixture
def subject(model_folder):
    return load(str(model_folder("qwen2", hidden_size=64, intermediate_size=64)))


def some_ids(rows: int = 5, length: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(1, 300, size=(rows, length)))


def test_a_witness_sees_rows_whatever_their_order_and_batches(subject):
    ids, witness = some_ids(), Witness(subject.model)
    with torch.inference_mode():
        for part in (ids[3:], ids[:3], ids[1:2]):
            subject.model(input_ids=part)
    assert witness.close() == hash_rows(ids)
    other = ids.clone()
    other[2, 7] += 1
    assert hash_rows(other) != hash_rows(ids)
    with torch.inference_mode():
        subject.model(input_ids=other)  # nobody listens any more
    assert Witness(subject.model).close() is None


def test_repeats_tell_spread_and_whether_values_are_the_same(monkeypatch):
    calls = []

    def quantize(folder, ids, options):
        calls.append(folder)
        value = torch.full((2, 2), float(len(calls) > 1))  # the first run differs
        return Quantized({"a": value}, 25.0, 4.0, {}, seen=hash_rows(ids))

    monkeypatch.setattr(fairness, "adapter", lambda name: SimpleNamespace(quantize=quantize))
    found, runs = fairness.quantize_repeatedly("folder", some_ids(), Options())
    assert torch.equal(found.weights["a"], torch.zeros(2, 2)) and len(runs) == 3 == len(calls)
    assert runs[0]["digest"] != runs[1]["digest"] == runs[2]["digest"]
    assert fairness.ids_that_reached(found, some_ids(), Options())["same"] is True
    assert fairness.ids_that_reached(found, some_ids(seed=1), Options())["same"] is False

    slow = Quantized({"a": torch.zeros(1)}, 100.0, 4.0, {})
    monkeypatch.setattr(fairness, "adapter", lambda name: SimpleNamespace(quantize=lambda *_: slow))
    found, runs = fairness.quantize_repeatedly("folder", some_ids(), Options())
    assert len(runs) == fairness.LEAST
    # It should have read text, and none was seen; of a method that needs none, nothing is to be seen.
    assert fairness.ids_that_reached(found, some_ids(), Options())["same"] is False
    assert fairness.ids_that_reached(found, some_ids(), Options("hqq"))["same"] is None


def test_uncompressed_runtime_is_compared(subject, monkeypatch):
    same = ModuleRuntime(load(str(subject.source.folder)).model.float())
    monkeypatch.setattr(fairness, "adapter", lambda name: SimpleNamespace(open_runtime=lambda folder, options: same))
    found = fairness.compare_runtimes(subject.source.folder, subject.model, some_ids(), Options())
    assert found["its"] == pytest.approx(found["ours"], rel=1e-5) and found["tokens"] == 5 * 15
    with torch.no_grad():
        same.model.model.norm.weight *= 1.5
    other = fairness.compare_runtimes(subject.source.folder, subject.model, some_ids(), Options())
    assert other["ours"] == found["ours"] and other["its"] != pytest.approx(found["its"], rel=1e-4)
    monkeypatch.setattr(fairness, "adapter", lambda name: SimpleNamespace())
    assert fairness.compare_runtimes(subject.source.folder, subject.model, some_ids(), Options()) is None


def test_a_runtime_takes_the_place_of_a_model(subject):
    """Items are scored as by the model itself, and blocks are still found inside."""
    from qlib.models.families import blocks_of

    exact = load(str(subject.source.folder)).model.float()
    stand_in = RuntimeModel(ModuleRuntime(exact), subject.model)
    documents = [np.random.default_rng(1).integers(1, 300, size=200) for _ in range(4)]
    items = build_items(documents, {"line": None, "any": None, "word": None}, 0, 6)
    for ours, theirs in zip(score_items(ModelLogits(exact), items, 0), score_items(ModelLogits(stand_in), items, 0)):
        np.testing.assert_allclose(theirs, ours, rtol=1e-4)
    assert len(blocks_of(stand_in)) == len(blocks_of(subject.model)) and stand_in.device.type == "cpu"


def test_decoding_step_by_step_is_one_long_prefill(subject):
    model = subject.model.float()
    runtime, ids = ModuleRuntime(model), some_ids(1, 12)[0]
    runtime.prefill(ids[:8])
    for at in range(8, 12):
        runtime.decode(ids[at : at + 1])
    assert runtime.cache.get_seq_length() == 12
    with torch.inference_mode():
        step = model(input_ids=ids[None, -1:], past_key_values=runtime.cache, use_cache=True).logits
    torch.testing.assert_close(step[0, -1], runtime(torch.cat([ids, ids[-1:]])[None], 1)[0, -1], rtol=1e-4, atol=1e-4)
