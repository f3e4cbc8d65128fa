"""Width pruning: least squares against numpy, greedy choice against trying all, and checkpoints that anybody loads."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from qlib.compress import compress
from qlib.errors import UserError
from qlib.models.load import load
from qlib.models.save import save
from qlib.params import Calibration
from qlib.prune.mask import mask_of
from qlib.prune.structures import Gram, channels_of, choose_structures, compensate, output_error, ridge

CALIBRATION = Calibration(samples=8, length=32)


def data(tokens=200, channels=12, outputs=5, seed=0):
    """Correlated inputs `[tokens, in]` and a weight `[out, in]`, float64."""
    make = torch.Generator().manual_seed(seed)
    mix = torch.randn(channels, channels, generator=make, dtype=torch.float64)
    inputs = torch.randn(tokens, channels, generator=make, dtype=torch.float64) @ mix
    return inputs, torch.randn(outputs, channels, generator=make, dtype=torch.float64)


def test_the_gram_matrix_holds_all_batches():
    inputs, _ = data()
    gram = Gram(12)
    for batch in inputs.float().split(64):
        gram.feed(batch)
    torch.testing.assert_close(gram.matrix, inputs.T @ inputs, rtol=1e-5, atol=1e-3)


def test_compensation_is_least_squares():
    inputs, weight = data()
    gram, keep = inputs.T @ inputs, torch.tensor([0, 2, 3, 7, 8, 11])
    fitted = compensate(weight, gram, keep, 1e-12)
    expected, *_ = np.linalg.lstsq(inputs[:, keep].numpy(), (inputs @ weight.T).numpy(), rcond=None)
    np.testing.assert_allclose(fitted.numpy(), expected.T, rtol=1e-6, atol=1e-8)
    direct = (inputs @ weight.T - inputs[:, keep] @ fitted.T).norm() / (inputs @ weight.T).norm()
    assert output_error(weight, gram, keep, fitted) == pytest.approx(direct.item(), rel=1e-6)
    assert output_error(weight, gram, keep, fitted) < output_error(weight, gram, keep, weight[:, keep])


def test_the_ridge_holds_on_to_the_weights_that_were_there():
    inputs, weight = data()
    gram, everything, keep = inputs.T @ inputs, torch.arange(12), torch.arange(6)
    torch.testing.assert_close(compensate(weight, gram, everything, 0.5), weight)
    torch.testing.assert_close(compensate(weight, gram, keep, 1e9), weight[:, keep], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(compensate(weight, torch.zeros(12, 12).double(), keep, 0.01), weight[:, keep])


def least_error(weight, gram, keep):
    firm = ridge(gram, 1e-3)
    return output_error(weight, firm, keep, compensate(weight, gram, keep, 1e-3))


@pytest.mark.parametrize("width", (1, 3))
def test_every_round_removes_what_costs_least(width):
    inputs, weight = data(seed=4)
    gram, count = inputs.T @ inputs, 12 // width
    alive = list(range(count))
    for left in range(count - 1, 0, -1):
        alive = min(
            (list(rest) for rest in itertools.combinations(alive, left)),
            key=lambda rest: least_error(weight, gram, channels_of(torch.tensor(rest), width)),
        )
        chosen = choose_structures(weight, gram, width, [0] * count, left, 1e-3)
        assert chosen.tolist() == alive


def test_without_compensation_the_cost_is_the_output_that_is_lost():
    inputs, weight = data(seed=2)
    lost = [(inputs[:, c : c + 2] @ weight[:, c : c + 2].T).norm().item() for c in range(0, 12, 2)]
    chosen = choose_structures(weight, inputs.T @ inputs, 2, [0] * 6, 4, 0.01, compensated=False)
    assert chosen.tolist() == sorted(np.argsort(lost)[2:].tolist())


@pytest.mark.parametrize("rounds", (None, 1, 2))
def test_every_group_keeps_its_quota(rounds):
    inputs, weight = data(channels=24)
    chosen = choose_structures(weight, inputs.T @ inputs, 2, [i // 4 for i in range(12)], 3, 0.01, rounds=rounds)
    assert [sum(int(c) // 4 == group for c in chosen) for group in range(3)] == [3, 3, 3]
    assert chosen.tolist() == sorted(set(chosen.tolist()))


def logits(model, seed=1):
    ids = torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model.float()(input_ids=ids).logits


LOADER = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
ids = torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(1))
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder).float()
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    made = model.generate(ids[:1, :4], attention_mask=torch.ones(1, 4), **settings)
    assert made.shape == (1, 10) and "qlib" not in sys.modules
    save_file({"logits": model(input_ids=ids).logits.detach().contiguous()}, folder + "/out")
"""
KINDS = {
    "qwen2": {"tied": True},
    "qwen2-all": {"num_key_value_heads": 4},
    "qwen3": {},
    "llama": {"attention_bias": True},
    "mistral-all": {"tied": True, "num_key_value_heads": 4},
}


def test_plain_transformers_loads_what_is_left(model_folder, tmp_path):
    from safetensors.torch import load_file

    expected = {}
    for name, changes in KINDS.items():
        subject = load(str(model_folder(name.partition("-")[0], name=name, intermediate_size=256, **changes)))
        original, folder = subject.config.to_dict(), str(tmp_path / f"small-{name}")
        kept = compress(subject, [{"pass": "width", "keep_heads": 0.5, "keep_ffn": 0.5}], CALIBRATION)
        assert subject.config.to_dict() == original, "the configuration that was handed in is not changed"
        save(kept, folder, "dense")
        config = json.loads((Path(folder) / "config.json").read_text())
        assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (2, 2, 16)
        assert config["intermediate_size"] == kept.model.config.intermediate_size == 128
        expected[folder] = logits(kept.model)
    subprocess.run([sys.executable, "-c", LOADER, *expected], check=True, cwd=tmp_path)
    for folder, ours in expected.items():
        torch.testing.assert_close(load_file(f"{folder}/out")["logits"], ours, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ("qwen2", "qwen3"))
@pytest.mark.parametrize("kv_heads, heads", ((2, (2, 2)), (4, (3, 3)), (1, (3, 1))))
def test_all_blocks_have_one_shape_and_compensation_helps(model_folder, kind, kv_heads, heads):
    folder = str(model_folder(kind, num_key_value_heads=kv_heads, intermediate_size=384))
    share = 0.5 if kv_heads == 2 else 0.75
    subject = compress(load(folder), [{"pass": "width", "keep_heads": share, "keep_ffn": 0.653}], CALIBRATION)
    for block in subject.model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        rows = {name: getattr(attention, name).weight.shape for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
        assert rows["q_proj"] == (heads[0] * 16, 64) and rows["o_proj"] == (64, heads[0] * 16)
        assert rows["k_proj"] == rows["v_proj"] == (heads[1] * 16, 64)
        assert mlp.gate_proj.weight.shape == mlp.up_proj.weight.shape == (256, 64)
        assert mlp.down_proj.weight.shape == (64, 256)
        if kind == "qwen2":
            assert attention.q_proj.bias.shape == (heads[0] * 16,) and attention.v_proj.bias.shape == (heads[1] * 16,)
    details = subject.details
    assert details["narrowed"] == f"@{share:g}/0.653" and details["shape_format"] == f"bf16@{share:g}/0.653"
    assert details["kept"] == {"heads": heads[0] / 4, "ffn": 256 / 384, "layers": 1.0}
    stayed = [(row["block"], len(row["heads"]), row["channels"]) for row in details["width"]]
    assert stayed == [(0, heads[0], 256), (1, heads[0], 256)]
    for row in details["width"]:
        for part in ("attention", "ffn"):
            assert row[f"{part}_error"] < row[f"{part}_error_plain"] < 1


def test_uncompensated_rows_are_those_of_the_original(model_folder):
    folder = str(model_folder("qwen2", num_key_value_heads=4, intermediate_size=384))
    original = load(folder).model
    recipe = [{"pass": "width", "keep_heads": 0.5, "keep_ffn": 0.5, "compensate": False}]
    subject = compress(load(folder), recipe, CALIBRATION)
    for old, new, row in zip(original.model.layers, subject.model.model.layers, subject.details["width"]):
        rows = channels_of(torch.tensor(row["heads"]), 16)
        for name in ("q_proj", "k_proj", "v_proj"):
            before, after = getattr(old.self_attn, name), getattr(new.self_attn, name)
            assert torch.equal(after.weight, before.weight[rows]) and torch.equal(after.bias, before.bias[rows])
        assert torch.equal(new.self_attn.o_proj.weight, old.self_attn.o_proj.weight[:, rows])
        assert row["attention_error"] == row["attention_error_plain"]


def test_keeping_everything_changes_nothing(model_folder):
    folder = str(model_folder("qwen2", num_key_value_heads=4))
    subject = compress(load(folder), [{"pass": "width", "keep_heads": 1.0, "keep_ffn": 1.0}], CALIBRATION)
    torch.testing.assert_close(logits(subject.model), logits(load(folder).model), rtol=0, atol=1e-4)
    assert subject.details["narrowed"] == "" and subject.details["shape_format"] == "bf16"


def test_masks_survive_and_a_grid_may_follow(model_folder):
    folder = str(model_folder("qwen2", intermediate_size=256))
    width = {"pass": "width", "keep_heads": 0.5, "keep_ffn": 0.5}
    subject = compress(load(folder), [{"pass": "magnitude"}, width], CALIBRATION)
    masks = [mask_of(block.mlp.down_proj).float().mean().item() for block in subject.model.model.layers]
    assert all(0 < kept < 0.8 for kept in masks)
    small = compress(load(folder), [width, {"pass": "rtn", "group_size": 32}], CALIBRATION)
    assert small.details["shape_format"] == "int4-g32@0.5" and torch.isfinite(logits(small.model)).all()


@pytest.mark.parametrize(
    "changes, step, words",
    [
        ({}, {"keep_heads": 0.0}, "recipe[0].keep_heads: 0.0 is not allowed; allowed: more than 0, at most 1"),
        ({}, {"keep_ffn": 1.5}, "recipe[0].keep_ffn: 1.5 is not allowed"),
        ({}, {"keep_heads": 0.2}, "recipe[0].keep_heads: 0.2 of 2 would remove every query head of a group"),
        ({"num_key_value_heads": 4}, {"keep_heads": 0.1},
         "recipe[0].keep_heads: 0.1 of 4 would remove every head of the model"),
        ({}, {"keep_ffn": 0.1}, "recipe[0].keep_ffn: 0.1 of 128 channels would remove all"),
        ({}, {"damp": 0.0}, "recipe[0].damp: 0.0 is not allowed; allowed: more than 0"),
        ({"kind": "llama", "num_key_value_heads": 4}, {"keep_heads": 0.75},
         "recipe[0].keep_heads: 0.75 leaves 3 heads, which model type 'llama' refuses"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_changes(model_folder, changes, step, words):
    subject = load(str(model_folder(**changes)))
    before = logits(subject.model)
    with pytest.raises(UserError) as caught:
        compress(subject, [{"pass": "width"} | step], CALIBRATION)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    torch.testing.assert_close(logits(subject.model), before, rtol=0, atol=0)


def test_a_packed_model_is_refused(model_folder):
    recipe = [{"pass": "rtn", "group_size": 32}, {"pass": "width", "keep_heads": 0.5, "keep_ffn": 1.0}]
    with pytest.raises(UserError, match="pass 'width' must come before the weights are put on a grid"):
        compress(load(str(model_folder())), recipe, CALIBRATION)


def test_the_ffn_stays_a_multiple_of_what_is_asked(model_folder):
    folder = str(model_folder(intermediate_size=384))
    widths = {}
    for multiple in (None, 64, 16):
        recipe = [{"pass": "width", "keep_heads": 1.0, "keep_ffn": 0.8, "multiple_of": multiple}]
        widths[multiple] = compress(load(folder), recipe, CALIBRATION).model.model.layers[0].mlp.up_proj.out_features
    assert widths == {None: 256, 64: 320, 16: 304}
    for multiple in (0, 100):
        with pytest.raises(UserError, match=f"recipe.0..multiple_of: {multiple} is not allowed; allowed: divisors of 384"):
            compress(load(folder), [{"pass": "width", "multiple_of": multiple}], CALIBRATION)
