"""Rotation: the function stays, for every architecture, tied or not; outliers go; checkpoints come back."""

import itertools

import pytest
import torch

from qlib.compress import compress
from qlib.errors import UserError
from qlib.layers import packed_layers
from qlib.models.families import blocks_of, is_tied
from qlib.models.load import load
from qlib.models.save import save
from qlib.params import Calibration
from qlib.recipe import Context
from qlib.transforms import rotate

KINDS = [("qwen2", {}), ("qwen3", {}), ("mistral", {}), ("llama", {"attention_bias": True, "mlp_bias": True})]
SIZES = [
    {},
    {"num_key_value_heads": 4, "hidden_size": 112},
    {"num_key_value_heads": 1, "hidden_size": 172, "head_dim": 20},
]


@pytest.mark.parametrize("kind, sizes, tied", itertools.product(KINDS, SIZES, (True, False)))
def test_logits_are_unchanged(subject, logits, kind, sizes, tied):
    one = subject(kind[0], tied, **kind[1], **sizes)
    before = logits(one)
    turned = rotate.apply(one, rotate.Options(), Context([], 0))
    assert (logits(turned) - before).abs().max() < 1e-4 * before.abs().max()
    assert not is_tied(turned.model) and not turned.config.tie_word_embeddings
    ends = ("layernorm.weight", "model.norm.weight")
    norms = [p for name, p in turned.model.named_parameters() if name.endswith(ends)]
    assert len(norms) == 5 and all((norm == 1).all() for norm in norms)
    words = {64: "hadamard 1 x 64", 112: "hadamard 28 x 4", 172: "random orthogonal 43 x 4"}[one.config.hidden_size]
    assert turned.details["rotation"]["stream"] == words


def test_heads_can_stay_as_they_are(subject, logits):
    one = subject()
    before = logits(one)
    turned = rotate.apply(one, rotate.Options(heads=False), Context([], 0))
    assert (logits(turned) - before).abs().max() < 1e-4 * before.abs().max()
    assert "heads" not in turned.details["rotation"]


def test_outliers_go_where_channels_of_the_stream_were_always_large(subject, ids):
    one, seen = subject("llama"), []
    with torch.no_grad():
        one.model.model.embed_tokens.weight[:, [5, 40]] *= 30
    for rotated in (False, True):
        if rotated:
            rotate.apply(one, rotate.Options(), Context([], 0))
        linear = blocks_of(one.model)[0].mlp.gate_proj
        handle = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
        with torch.no_grad():
            one.model(ids[0])
        handle.remove()
    for before, after in [(kurtosis(seen[0]), kurtosis(seen[1])), (largest(seen[0]), largest(seen[1]))]:
        assert after < 0.6 * before
    assert kurtosis(seen[1]) < 4


def kurtosis(x):
    return (x.pow(4).mean() / x.pow(2).mean() ** 2).item()


def largest(x):
    """Largest magnitude of a token relative to its root mean square, on average."""
    return (x.abs().amax(1) / x.pow(2).mean(1).sqrt()).mean().item()


@pytest.mark.parametrize("tied, format", [(True, "packed"), (True, "dense"), (False, "packed")])
def test_rotated_checkpoints_come_back(model_folder, tmp_path, tied, format):
    recipe = [{"pass": "rotate"}, {"pass": "rtn", "bits": 4, "group_size": 32}][: 1 if format == "dense" else 2]
    original = load(str(model_folder("qwen2", tied)))
    subject = compress(load(str(model_folder("qwen2", tied))), recipe)
    save(subject, tmp_path / "rotated", format)
    again = load(str(tmp_path / "rotated"))
    assert not again.config.tie_word_embeddings and not is_tied(again.model)
    batch = torch.arange(40)[None]
    with torch.no_grad():
        ours, back, first = (one.model(batch).logits.float() for one in (subject, again, original))
    assert torch.equal(ours, back)
    assert torch.nn.functional.cosine_similarity(ours, first, dim=-1).mean() > 0.97


def test_the_seed_draws_the_signs(model_folder):
    folder = str(model_folder("qwen2"))
    found = [compress(load(folder), [{"pass": "rotate"}], seed=seed).model.lm_head.weight for seed in (0, 0, 1)]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_it_composes_with_gptq_and_with_awq(model_folder):
    gptq = {"pass": "gptq", "bits": 3, "group_size": 32}
    for recipe in ([{"pass": "rotate"}, gptq], [{"pass": "rotate"}, {"pass": "awq"}, gptq]):
        subject = compress(load(str(model_folder("qwen2"))), recipe, Calibration(samples=4, length=32))
        assert len(packed_layers(subject.model)) == 14 and subject.details["rotation"]["heads"] == "hadamard 1 x 16"


@pytest.mark.parametrize(
    "recipe, words",
    [
        ([{"pass": "rtn", "group_size": 32}, {"pass": "rotate"}], "recipe[1]: pass 'rotate' must come before"),
        ([{"pass": "magnitude"}, {"pass": "rotate"}], "'rotate' would fill what was pruned"),
    ],
)
def test_what_cannot_work_is_refused(model_folder, recipe, words):
    with pytest.raises(UserError) as caught:
        compress(load(str(model_folder())), recipe)
    assert words in str(caught.value)
