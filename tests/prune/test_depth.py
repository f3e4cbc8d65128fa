"""Depth pruning: which blocks go, by brute force; patches against least squares; checkpoints that anybody loads."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from qlib.compress import compress
from qlib.errors import UserError
from qlib.models.families import blocks_of
from qlib.models.load import load
from qlib.models.save import save
from qlib.params import Calibration
from qlib.prune import depth
from qlib.walk import first_inputs, run_block

CALIBRATION = Calibration(samples=8, length=32)


def ids(rows=8, length=32):
    return list(torch.randint(0, 300, (rows, length), generator=torch.Generator().manual_seed(0)).split(4))


def hidden_states(model, batches) -> list[torch.Tensor]:
    """What reaches each block, and what the last one makes, `[tokens, hidden]` in float64."""
    with torch.no_grad():
        outputs = model(input_ids=torch.cat(batches), output_hidden_states=True, use_cache=False)
    reached = [state.flatten(0, 1).double() for state in outputs.hidden_states[:-1]]  # the last one is normed
    last = first_inputs(model, batches)
    for block in blocks_of(model):
        last = run_block(block, last)
    return [*reached, torch.cat([state for state, _ in last]).flatten(0, 1).double()]


@pytest.mark.parametrize("count", (1, 2, 3))
def test_influences_and_angles_are_those_of_the_hidden_states(model_folder, count):
    model = load(str(model_folder(num_hidden_layers=5))).model.float()
    states = hidden_states(model, ids())
    cosine = lambda a, b: torch.cosine_similarity(a, b, dim=-1)  # noqa: E731
    influences, distances = depth._measure(model, ids(), count)
    assert influences == pytest.approx([1 - cosine(a, b).mean().item() for a, b in zip(states, states[1:])], abs=1e-5)
    wanted = [cosine(a, b).arccos().mean().item() / torch.pi for a, b in zip(states, states[count:])]
    assert distances == pytest.approx(wanted, abs=1e-4) and len(distances) == 6 - count


def test_the_least_go():
    influences, distances = [0.5, 0.1, 0.4, 0.05, 0.2], [0.3, 0.2, 0.1, 0.4]
    assert depth.choose_blocks(influences, distances, 2, False) == [1, 3]
    assert depth.choose_blocks(influences, distances, 2, True) == [2, 3]
    assert depth.choose_blocks(influences, [], 0, False) == []


def test_a_patch_is_least_squares():
    random = torch.Generator().manual_seed(0)
    m, r = (torch.randn(80, 6, generator=random, dtype=torch.float64) for _ in range(2))
    found = depth.fit_patch(m.t() @ m, m.t() @ r, 1e-12)
    np.testing.assert_allclose(found.numpy(), np.linalg.lstsq(m.numpy(), r.numpy(), rcond=None)[0], rtol=1e-6, atol=1e-8)
    nothing = depth.fit_patch(m.t() @ m, m.t() @ r, 1e9)
    torch.testing.assert_close(nothing, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-4)


@pytest.mark.parametrize("contiguous", (False, True))
def test_patches_bring_the_hidden_states_closer(model_folder, contiguous):
    step = {"pass": "depth", "keep_layers": 0.6, "contiguous": contiguous}
    found = compress(load(str(model_folder(num_hidden_layers=5))), [step], CALIBRATION)
    gone = found.details["depth"]["gone"]
    assert len(gone) == 2 and len(blocks_of(found.model)) == 3 and found.details["kept"]["layers"] == 0.6
    assert not contiguous or gone[1] == gone[0] + 1
    gaps = [index for index in gone if index - 1 not in gone and index > 0]
    assert [one["block"] for one in found.details["depth"]["patches"]] == [index - 1 for index in gaps]
    assert all(one["error"] < one["error_plain"] for one in found.details["depth"]["patches"])


def test_without_patches_what_stays_is_untouched(model_folder):
    whole, found = (load(str(model_folder(num_hidden_layers=5))) for _ in range(2))
    found = compress(found, [{"pass": "depth", "keep_layers": 0.4, "patch": False}], CALIBRATION)
    stay = [index for index in range(5) if index not in found.details["depth"]["gone"]]
    for block, index in zip(blocks_of(found.model), stay):
        for name, tensor in block.state_dict().items():
            assert torch.equal(tensor, blocks_of(whole.model)[index].state_dict()[name])
    everything = compress(load(str(model_folder())), [{"pass": "depth", "keep_layers": 1.0}], CALIBRATION)
    assert everything.details["depth"]["gone"] == []


LOADER = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
ids = torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(1))
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder).float()
    made = model.generate(ids[:1, :4], attention_mask=torch.ones(1, 4), max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert made.shape == (1, 10) and "qlib" not in sys.modules
    save_file({"logits": model(input_ids=ids).logits.detach().contiguous()}, folder + "/out")
"""


def test_plain_transformers_loads_what_is_left(model_folder, tmp_path):
    from safetensors.torch import load_file

    expected, asked = {}, torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(1))
    for kind in ("qwen2", "qwen3", "llama", "mistral"):
        subject = load(str(model_folder(kind, num_hidden_layers=4)))
        original, folder = subject.config.to_dict(), str(tmp_path / f"short-{kind}")
        short = compress(subject, [{"pass": "depth", "keep_layers": 0.5}], CALIBRATION)
        assert subject.config.to_dict() == original, "the configuration that was handed in is not changed"
        save(short, folder, "dense")
        assert json.loads((Path(folder) / "config.json").read_text())["num_hidden_layers"] == 2
        with torch.no_grad():
            expected[folder] = short.model.float()(input_ids=asked).logits
    subprocess.run([sys.executable, "-c", LOADER, *expected], check=True, cwd=tmp_path)
    for folder, ours in expected.items():
        torch.testing.assert_close(load_file(f"{folder}/out")["logits"], ours, rtol=0, atol=0)


def test_a_grid_may_follow(model_folder):
    recipe = [{"pass": "depth", "keep_layers": 0.5}, {"pass": "gptq", "bits": 4, "group_size": 32}]
    found = compress(load(str(model_folder(num_hidden_layers=4))), recipe, CALIBRATION)
    assert len({layer["name"] for layer in found.details["layers"]}) == 14


@pytest.mark.parametrize(
    "step, words",
    [
        ({"keep_layers": 0.1}, "keep_layers: 0.1 of 4 blocks is not allowed; allowed: 0.125 to 1"),
        ({"keep_layers": 1.5}, "keep_layers: 1.5 of 4 blocks is not allowed"),
        ({"damp": 0.0}, "damp: 0.0 is not allowed; allowed: more than 0"),
    ],
)
def test_what_cannot_work_is_refused(model_folder, step, words):
    with pytest.raises(UserError) as caught:
        compress(load(str(model_folder(num_hidden_layers=4))), [{"pass": "depth"} | step], CALIBRATION)
    assert words in str(caught.value)
    with pytest.raises(UserError, match="would fill what was pruned"):
        compress(load(str(model_folder(num_hidden_layers=4))), [{"pass": "magnitude"}, {"pass": "depth"}], CALIBRATION)
