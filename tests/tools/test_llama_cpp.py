"""llama.cpp loads what we export and computes the same; what it quantizes, scores and times is what was asked."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gguf import GGUFReader, quants

from qlib.compress import compress
from qlib.errors import UserError
from qlib.evaluate.items import Item
from qlib.evaluate.logits import ModelLogits
from qlib.evaluate.precision import in_float32
from qlib.evaluate.quality import score_items, score_windows
from qlib.export.gguf import export, importance
from qlib.models.load import Source, Subject, load
from qlib.tools.environments import environment_of
from qlib.tools.exam import Exam, write_exam
from qlib.tools.llama_client import call, call_all, start

STATE = environment_of("llama-cpp").state
pytestmark = [
    pytest.mark.tools,
    pytest.mark.skipif(STATE != "installed", reason=f"llama-cpp is {STATE}: run `qlib tools install llama-cpp`"),
]
TEXT = "def f(x, *, y=None):\n    return {'a': x[1:10_000], 'naïve': \"日本\"}  # it's 3.14\n\n\n\tclass Ä: pass  "
IDS = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(0))

#: Architectures, and what llama.cpp has to know of them: every one is written in fp32 and must agree to rounding.
EXACT = {
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tied": True}),
    "qwen2-pruned": ("qwen2", {"num_attention_heads": 6, "intermediate_size": 96}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-scaled": (
        "llama",
        {"rope_parameters": {
            "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }},
    ),
    "mistral": ("mistral", {}),
}  # fmt: skip
#: Grids and the type each becomes. llama.cpp rounds what a quantized weight is multiplied with to 8 bits in blocks of
#: 32, so its logits differ by about 1.5 % (measured, of their spread) from ours, which round nothing but weights.
PACKED = {
    "Q4_0": {"pass": "rtn", "bits": 4, "group_size": 64, "symmetric": True},
    "Q4_1": {"pass": "rtn", "bits": 4, "group_size": 32},
    "Q8_0": {"pass": "rtn", "bits": 8, "group_size": None, "symmetric": True},
    "Q4_0-of-int3": {"pass": "rtn", "bits": 3, "group_size": 128},
    "MXFP4": {"pass": "rtn", "bits": 4, "element": "mxfp4"},
}
ROUNDED = 0.03
#: Shape, kind, types that must be there, bits: rows of 64 and 128 are no multiple of the 256 that K-quants need.
QUANTIZED = {
    "narrow": ({}, "Q4_K_M", {"Q5_0", "Q8_0"}, (5.5, 6.5)),
    "wide": (dict(hidden_size=256, head_dim=64, intermediate_size=512), "Q2_K", {"Q2_K", "Q3_K"}, (2.6, 3.4)),
    "newest": (dict(hidden_size=256, head_dim=64, intermediate_size=512), "Q2_0", {"Q2_0"}, (2.25, 2.25)),
}
#: Types that the gguf package can read as well.
READ = ("Q4_0", "IQ4_NL", "Q8_0")


def logits(subject, ids):
    with torch.inference_mode(), in_float32(subject.model):
        return ModelLogits(subject.model)(ids, ids.shape[1]).float().numpy()


def filled(model):
    """Biases and norms of a fresh model are 0 and 1, which would hide mistakes: give them other values."""
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "bias", None) is not None:
                module.bias.copy_(torch.linspace(-0.5, 0.5, len(module.bias)))
            if "norm" in type(module).__name__.lower():
                module.weight.copy_(torch.linspace(0.5, 1.5, len(module.weight)))
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def exam():
    text = "import numpy as np\n\n\ndef mean(values):\n    return np.sum(values)\n" * 6
    ids = load("reference").tokenizer(text)["input_ids"]
    choices = np.random.default_rng(0).integers(0, 2048, (3, 4, 3)).tolist()
    items = [Item(0, 0, tuple(ids[at : at + 10]), tuple(map(tuple, four))) for at, four in enumerate(choices)]
    return Exam(items, [(0, ids[:60]), (0, ids[5:40])], 0, 1)


@pytest.fixture(scope="module")
def found(tmp_path_factory, tiny_model, tokenizer, exam):
    """All exports, and all that llama.cpp has to say about them, from one process of it."""
    folder, calls, ours = tmp_path_factory.mktemp("gguf"), {}, {}
    np.save(folder / "ids.npy", IDS.numpy())
    write_exam(exam, folder / "exam.npz")

    def tiny(kind, **changes):
        model = filled(tiny_model(kind, initializer_range=0.2, **changes))
        return Subject(model, tokenizer, model.config, Source("tiny", Path(), None))

    def ask(name, subject, exact=False):
        told = export(subject, folder / f"{name}.gguf", dense="f32" if exact else "f16")
        ours[name] = logits(subject, IDS), told
        target = folder / f"{name}.npy"
        calls[name] = "logits", dict(file=told["file"], ids=folder / "ids.npy", target=target, exact=exact)

    for name, (kind, changes) in EXACT.items():
        ask(name, tiny(kind, **changes), exact=True)
    for name, step in PACKED.items():
        ask(name, compress(load("reference"), [step]))
    ask("dense", load("reference"))
    file = ours["dense"][1]["file"]
    calls["tokens"] = "tokenize", dict(file=file, text=TEXT)
    calls["exam"] = "answer", dict(file=file, exam=folder / "exam.npz", target=folder / "answers.npz")
    for name, (changes, kind, _, _) in QUANTIZED.items():
        subject = tiny("qwen2", **changes)
        source, weights = export(subject, folder / f"{name}.gguf")["file"], folder / f"{name}.npz"
        np.savez(weights, **importance(subject.model, [IDS]))
        calls[name] = "quantize", dict(source=source, target=folder / "q.gguf", kind=kind, importance=weights)
    for kind in READ:
        own, read = (folder / f"{kind}-{end}.gguf" for end in ("own", "read"))
        calls[f"{kind}-own"] = "quantize", dict(source=file, target=own, kind=kind)
        calls[f"{kind}-read"] = "dequantize", dict(source=own, target=read)
    timing = dict(model="reference", threads=1, prompt=16, context=8, rounds=3)
    calls["layer"] = "time_layer", timing | {"kinds": ["Q4_0", "F16"]}
    told = dict(zip(calls, call_all(*calls.values())))
    return SimpleNamespace(ours=ours, told=told, folder=folder, load=lambda name: np.load(folder / name))


@pytest.mark.parametrize("name", EXACT)
def test_logits_of_every_architecture_agree_in_fp32(found, name):
    ours, theirs = found.ours[name][0], found.load(f"{name}.npy")
    assert np.abs(theirs - ours).max() < 1e-4 * ours.std()


@pytest.mark.parametrize("name", PACKED)
def test_logits_of_packed_weights_agree_but_for_rounded_activations(found, name):
    (ours, told), theirs = found.ours[name], found.load(f"{name}.npy")
    assert set(told["types"].values()) == {"F32", "F16", name.partition("-")[0]}
    distance = np.sqrt(np.square(theirs - ours).mean())
    assert distance < ROUNDED * ours.std()
    if name != "Q8_0":  # far less than what rounding the weights does
        assert distance < 0.3 * np.sqrt(np.square(found.ours["dense"][0] - ours).mean())


def test_text_becomes_the_same_tokens(found):
    assert found.told["tokens"] == load("reference").tokenizer(TEXT)["input_ids"]


def test_the_scorer_runs_unchanged(found, exam):
    """F16 through llama.cpp and fp32 through torch give the same likelihoods of windows and of options."""
    subject = load("reference")
    with in_float32(subject.model):
        inside, alone = score_items(ModelLogits(subject.model), exam.items, exam.start)
        scores = score_windows(ModelLogits(subject.model), exam.texts, exam.start)
    theirs = found.load("answers.npz")
    assert np.allclose(theirs["inside"], inside, atol=0.05) and np.allclose(theirs["alone"], alone, atol=0.05)
    assert np.allclose(theirs["nll"], scores.nll, rtol=2e-3) and (theirs["tokens"] == [60, 35]).all()
    assert found.told["exam"]["perplexity"] == pytest.approx(np.exp(scores.nll.sum() / 95), rel=2e-3)


@pytest.mark.parametrize("name", QUANTIZED)
def test_llama_cpp_quantizes_and_says_what_fell_back(found, name):
    told, (_, _, types, (low, high)) = found.told[name], QUANTIZED[name]
    assert types <= set(told["types"]) and told["types"]["F16"] == 2  # embedding and head
    assert low <= told["bits_per_weight"] <= high
    assert bool(told["warnings"]) == (name == "narrow")


@pytest.mark.parametrize("kind", READ)
def test_values_that_it_reads_back_are_those_of_the_gguf_package(found, kind):
    stored, values = (GGUFReader(found.folder / f"{kind}-{end}.gguf").tensors for end in ("own", "read"))
    assert kind in {tensor.tensor_type.name for tensor in stored}
    for one, plain in zip(stored, values, strict=True):
        assert (one.name, plain.tensor_type.name) == (plain.name, "F32")
        np.testing.assert_array_equal(quants.dequantize(one.data, one.tensor_type), plain.data, err_msg=one.name)


def test_timings_are_one_number_for_each_round(found):
    told = found.told["layer"]
    for phase in ("decode_ms", "prefill_ms"):
        assert list(told[phase]) == ["Q4_0", "F16", "rest"] and all(len(rounds) == 3 for rounds in told[phase].values())
        assert min(min(rounds) for rounds in told[phase].values()) > 0
    assert told["bits_per_weight"]["Q4_0"] == 4.5


def test_timings_take_turns_line_by_line():
    process = start(("time_model", dict(model="reference", kinds=["Q8_0"], threads=1, prompt=16, context=8, rounds=0)))
    out, error = process.communicate("decode\nprefill\n")
    opened, decode, prefill, _ = map(json.loads, out.splitlines())
    assert opened["heads"] == {"Q8_0": "Q8_0"} and decode["Q8_0"] > 0 and prefill["Q8_0"] > 0, error


def test_what_llama_cpp_does_not_know_is_an_error_of_one_line(tmp_path):
    with pytest.raises(UserError, match="kind: 'Q9' is unknown; allowed: BF16, F16"):
        call("quantize", source=tmp_path / "none.gguf", target=tmp_path / "q.gguf", kind="Q9")
