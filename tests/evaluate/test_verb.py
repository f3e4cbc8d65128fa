"""`evaluate` end to end on a tiny model and a folder of texts: figures agree with sums written out by hand."""

import numpy as np
import pytest
import torch

from qlib.compress import compress
from qlib.evaluate import baseline
from qlib.evaluate.items import LEVELS
from qlib.evaluate.logits import ModelLogits
from qlib.evaluate.verb import evaluate
from qlib.layers import packed_layers
from qlib.models.load import load
from qlib.params import Evaluation


@pytest.fixture
def texts(tmp_path, monkeypatch):
    monkeypatch.setenv("QLIB_CACHE", str(tmp_path / "cache"))
    generator = np.random.default_rng(0)
    words = "add point index return class pass self first second print".split()
    (tmp_path / "texts").mkdir()
    for number in range(24):
        body = "".join(word + generator.choice([" ", "\n"]) for word in generator.choice(words, 900))
        (tmp_path / "texts" / f"{number}.txt").write_text(f"{number} {body}")
    return Evaluation(text=str(tmp_path / "texts"), length=64, bootstrap=200)


RECIPE = [{"pass": "rtn", "bits": 3, "group_size": 32}]


def test_the_baseline_against_itself(model_folder, texts):
    quality = evaluate(load(str(model_folder())), texts, against=None)
    found, items = quality.measurements, quality.details["items"]
    right = (items["item_inside"] - items["item_alone"])[:, 0] > (items["item_inside"] - items["item_alone"])[:, 1:].max(1)
    level = next(i for i, x in enumerate(LEVELS) if x.name == quality.details["headline_level"])
    assert found["quality.accuracy"].value == pytest.approx(100 * right[items["item_level"] == level].mean())
    nats = items["document_nll"].sum() / items["document_tokens"].sum()
    assert found["quality.perplexity"].value == pytest.approx(np.exp(nats))
    assert found["quality.perplexity"].n == items["document_tokens"].sum()
    for m in found.values():
        assert m.low <= m.value <= m.high
    assert "quality.kl" not in found and "seed 0" in quality.details["protocol"]


def test_perplexity_and_bits_per_byte_measure_the_same_likelihood(model_folder, texts):
    found = evaluate(load(str(model_folder())), texts, against=None).measurements
    nats = np.log(found["quality.perplexity"].value)
    per_token = found["quality.bits_per_byte"].value / (nats / np.log(2))  # tokens per byte
    assert 0.2 < per_token < 1


def test_differences_are_paired_with_the_artefact_of_the_baseline(model_folder, texts):
    folder = str(model_folder())
    base = evaluate(load(folder), texts, against=None)
    rounded = compress(load(folder), RECIPE)
    quality = evaluate(rounded, texts)
    found = quality.measurements
    ours, theirs = (q.measurements["quality.accuracy"].value for q in (quality, base))
    assert found["quality.accuracy_delta"].value == pytest.approx(ours - theirs)
    ratio = found["quality.perplexity"].value / base.measurements["quality.perplexity"].value
    assert found["quality.perplexity_ratio"].value == pytest.approx(ratio)
    assert found["quality.kl"].value > 0 and 0 < found["quality.top1_agreement"].value < 100


def test_divergence_is_that_of_the_two_distributions(model_folder, texts):
    folder = str(model_folder())
    quality = evaluate(compress(load(folder), RECIPE), texts)
    original, rounded = load(folder).model.float(), compress(load(folder), RECIPE).model
    for name, layer in packed_layers(rounded).items():
        linear = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        linear.weight.data = layer.compressed().dequantize()
        if layer.bias is not None:
            linear.bias.data = layer.bias.float()
        parent, _, leaf = name.rpartition(".")
        setattr(rounded.get_submodule(parent), leaf, linear)
    ids = torch.randint(1, 300, (4, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        p, q = (m.float()(ids).logits.double().log_softmax(-1) for m in (original, rounded))
    expected = (p.exp() * (p - q)).sum(-1).mean().item()
    assert 0.3 * expected < quality.measurements["quality.kl"].value < 3 * expected  # another text, the same size


def test_an_unchanged_model_differs_in_nothing(model_folder, texts):
    found = evaluate(load(str(model_folder())), texts).measurements
    assert found["quality.accuracy_delta"].value == 0 and found["quality.perplexity_ratio"].value == 1
    assert found["quality.kl"].value < 1e-5 and found["quality.top1_agreement"].value == 100


def test_the_same_twice_and_in_bf16_afterwards(model_folder, texts):
    subject = load(str(model_folder()))
    before = [p.clone() for p in subject.model.parameters()]
    state = torch.get_rng_state()
    one, two = evaluate(subject, texts), evaluate(subject, texts)
    assert one.measurements == two.measurements
    for name, array in one.details["items"].items():
        assert np.array_equal(array, two.details["items"][name])
    for old, new in zip(before, subject.model.parameters()):
        assert new.dtype == torch.bfloat16 and torch.equal(old, new)
    assert torch.equal(torch.get_rng_state(), state)


def test_another_scorer_asks_the_baseline_again(model_folder, texts, monkeypatch, tmp_path):
    folder = str(model_folder())
    for scorer, kept in ((2, 1), (2, 1), (3, 2)):
        monkeypatch.setattr(baseline, "SCORER", scorer)
        evaluate(load(folder), texts, against=None)
        assert len(list((tmp_path / "cache" / "baseline").iterdir())) == kept


def test_the_answers_with_shared_contexts_are_those_of_separate_rows(model_folder, texts, monkeypatch):
    rounded = compress(load(str(model_folder())), RECIPE)
    shared = evaluate(rounded, texts)
    monkeypatch.setattr(ModelLogits, "branches", None)
    separate = evaluate(rounded, texts)
    np.testing.assert_allclose(
        shared.details["items"]["item_inside"], separate.details["items"]["item_inside"], atol=1e-4
    )
    assert shared.details["levels"] == separate.details["levels"]
