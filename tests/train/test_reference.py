"""The reference model: shipped whole, fit to be measured on, and described by its own records."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from qlib.data.corpus import MANIFEST
from qlib.models.load import load, locate
from qlib.params import Evaluation
from qlib.train import reference
from qlib.train.acceptance import Acceptance, accept
from qlib.train.card import card

FOLDER = locate("reference").folder


def test_it_is_shipped_whole():
    assert {"config.json", "model.safetensors", "tokenizer.json", "training.json", "README.md"} <= {
        file.name for file in FOLDER.iterdir()
    }
    subject = load("reference")
    assert {p.dtype for p in subject.model.parameters()} == {torch.bfloat16}
    text = "def add(first, second):\n    return first + second\n"
    assert subject.tokenizer.decode(subject.tokenizer(text)["input_ids"]) == text


def test_input_widths_stay_multiples_of_128_when_a_third_of_heads_and_channels_goes():
    config = load("reference").config
    heads, channels = config.num_attention_heads * 2 // 3, config.intermediate_size * 2 // 3
    for width in (config.hidden_size, config.num_attention_heads * config.head_dim, config.intermediate_size):
        assert width % 128 == 0
    assert heads % config.num_key_value_heads == 0
    assert heads * config.head_dim % 128 == 0 and channels % 128 == 0


def test_it_was_trained_on_the_manifest_with_20_tokens_for_each_parameter():
    training, first = (json.loads((folder / "training.json").read_text()) for folder in (FOLDER, locate("reference-1").folder))
    assert training["parameters"] == sum(p.numel() for p in load("reference").model.parameters())
    assert training["earlier"] == {"name": "reference-1", "tokens": first["tokens"], "seconds": first["seconds"]}
    assert training["tokens"] + first["tokens"] >= 20 * training["parameters"]
    for one in (training, first):
        assert one["manifest_sha256"] == hashlib.sha256(MANIFEST.read_bytes()).hexdigest()
    assert first["curve"][-1][1] < first["curve"][0][1] - 2
    assert training["held_out"][-1][1] < training["held_out"][0][1] - 0.2


@pytest.mark.slow
def test_the_scorer_tells_8_4_3_and_2_bits_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("QLIB_CACHE", str(tmp_path))
    found = accept("reference", Evaluation(documents=300, items=900))
    assert found.separated
    perplexities = [row["perplexity"] for row in found.rows[1:]]
    assert perplexities == sorted(perplexities)
    assert perplexities[-1] > 1.5 * perplexities[0]  # two bits hurt clearly
    assert found.rows[1]["low"] < 1.005 and found.rows[1]["high"] > 0.995  # eight bits do not


def test_random_weights_follow_the_seed_and_leave_the_callers_state():
    config = reference.configuration(64, 32, 1, 2, 1, 16, 48)
    state = torch.get_rng_state()
    one, same, other = (reference.random_model(config, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    pairs = zip(one.parameters(), same.parameters())
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))


def test_the_card_says_what_the_records_say():
    rows = [{"bits": 16, "perplexity": 10.5, "accuracy": 91.2, "ratio": None, "low": None, "high": None}]
    rows.append({"bits": 2, "perplexity": 40.25, "accuracy": 81.0, "ratio": 3.8, "low": 3.7, "high": 3.9})
    level = {"level": "easy", "cut": "cut anywhere", "context": 48, "continuation": 16, "value": 91.2, "low": 90.0, "high": 92.4, "n": 1000}
    training = {
        "tokens": 46_000_000, "parameters": 2_000_000, "stream_tokens": 23_000_000, "seconds": 3600.0, "corpus": "Python source of numpy==2.0",
        "schedule": {"batch_tokens": 8192, "peak_lr": 0.004, "final_share": 0.01}, "curve": [[8192, 7.5], [46_000_000, 2.125]],
        "held_out": [[46_000_000, 2.25]], "machine": {"cpu": "some CPU", "cores": 2},
    }  # fmt: skip
    config = reference.configuration(64, 32, 1, 2, 1, 16, 48)
    text = card("reference-9", config, training, Acceptance(rows, [level], separated=True, in_band=True))
    for words in ("# reference-9", "23 per parameter", "2.00 passes", "1 h 00 min on some CPU", "Acceptance: accepted",
                  "| 2 | 40.25 | 81.0 % | 3.800 (3.700 to 3.900) |", "91.2 % (90.0 to 92.4)", "2.125"):  # fmt: skip
        assert words in text, words
    later = training | {"tokens": 10_000_000, "earlier": {"name": "reference-8", "tokens": 46_000_000}}
    text = card("reference-9", config, later, Acceptance(rows, [level], separated=True, in_band=True))
    assert "on top of the 46,000,000 of reference-8 (28 per parameter)" in text and "0.43 passes" in text
    assert "NOT accepted" in card("x", config, training, Acceptance(rows, [level], separated=False, in_band=True))


def test_training_goes_on_from_a_saved_model(tmp_path, tokenizer):
    model = reference.random_model(reference.configuration(300, 64, 1, 2, 1, 32, 128), 0)
    reference.save(model, tokenizer, {"tokens": 7}, Path(tmp_path / "model"))
    begun, _, earlier = reference.start_from(str(tmp_path / "model"))
    assert earlier["tokens"] == 7 and all(p.dtype == torch.float32 for p in begun.parameters())
    saved = load(str(tmp_path / "model")).model.state_dict()
    assert all(torch.equal(value, saved[key].float()) for key, value in begun.state_dict().items())
    texts = [str(number) for number in range(50)]
    mixed = reference.shuffled(texts, 3)
    assert sorted(mixed) == sorted(texts) and mixed != texts and mixed == reference.shuffled(texts, 3)


def test_saving_gives_a_loadable_bf16_model(tmp_path, tokenizer):
    model = reference.random_model(reference.configuration(300, 64, 1, 2, 1, 32, 128), 0)
    reference.save(model, tokenizer, {"tokens": 1}, Path(tmp_path / "model"))
    subject = load(str(tmp_path / "model"))
    assert subject.config.head_dim == 32 and json.loads((tmp_path / "model" / "training.json").read_text()) == {"tokens": 1}
