"""The check of the extrapolation: what is run whole is the whole model, and the sum is layers x layer + head."""

import numpy as np
import pytest
import torch

from qlib.evaluate import parts
from qlib.evaluate.fastest import PlainLinear
from qlib.evaluate.timing import Timed
from qlib.models.shapes import Shape, find_shape
from qlib.scale import check
from qlib.scale.check import check_compression, check_speed, peers, whole_peer
from qlib.scale.layer import Cost

TINY = Shape("tiny", 3, 128, 4, 2, 256, 96, tied=True, head_dim=64)


def test_peers_are_the_published_shapes_up_to_that_size():
    assert peers("qwen-72b")[-2:] == ["qwen-72b", "qwen2.5-72b"] and len(peers("qwen-72b")) == 6
    assert peers("qwen2.5-1.5b") == ["qwen2.5-0.5b", "qwen2.5-1.5b"] and peers("reference-2") == ["reference-2"]


def test_the_whole_model_is_the_smallest_that_no_format_fits_into_the_cache():
    formats = ["bf16", "int4-g128"]
    half, one = (find_shape(name) for name in ("qwen2.5-0.5b", "qwen2.5-1.5b"))
    smallest = half.layers * parts.layer_bytes(half, "int4-g128")
    assert whole_peer("qwen-72b", formats, cache=smallest // 4 - 1) == half.name
    assert whole_peer("qwen-72b", formats, cache=smallest // 4 + 1) == one.name
    assert whole_peer("qwen-72b", ["bf16"], cache=smallest // 4 + 1) == half.name
    assert whole_peer("qwen-72b", formats, cache=2**40) == one.name, "larger ones cannot be held whole"


@pytest.mark.parametrize("format", ["bf16", "int4-g128"])
@torch.inference_mode()
def test_what_is_timed_as_the_whole_computes_what_the_model_computes(format):
    random = torch.Generator().manual_seed(0)
    model = parts.build_model(TINY, format, PlainLinear, random)
    calls = check._calls(TINY, format, model, 7, 0, random)
    assert {name: len(copies) for name, copies in calls.items()} == {
        f"{format} whole": 1, f"{format} layer": TINY.layers, f"{format} head": 1
    }  # fmt: skip
    ours, theirs = calls[f"{format} whole"][0](), model(torch.zeros(1, 7, dtype=torch.long), use_cache=False).logits[0, -1]
    assert torch.nn.functional.cosine_similarity(ours.float(), theirs.float(), dim=0) > 0.999


def test_whole_and_sum_are_paired_by_round(monkeypatch):
    whole, layer, head = np.array([10.0, 20.0, 30.0]), np.array([2.0, 4.0, 6.0]), np.array([4.0, 8.0, 12.0])
    times = {f"{format} {part}": values for format in ("bf16", "int8") for part, values in
             (("whole", whole), ("layer", layer), ("head", head))}  # fmt: skip
    monkeypatch.setattr(check, "time_rounds", lambda calls, rounds, device: Timed(times, 0, True))
    monkeypatch.setattr(check, "find_shape", lambda name: TINY)
    found = check_speed("tiny", ["bf16", "int8"], 8, 4, rounds=3)
    assert list(found) == ["bf16 decode", "int8 decode", "bf16 prefill", "int8 prefill"]
    ratio = found["int8 prefill"]["ratio"]
    assert (ratio.value, ratio.low, ratio.high, ratio.n) == (1, 1, 1, 3), "10 / (3 x 2 + 4), and so on"
    assert (found["bf16 decode"]["sum"].value, found["bf16 decode"]["whole"].value) == (20, 20)


def test_a_whole_tiny_model_is_timed(monkeypatch):
    monkeypatch.setattr(check, "find_shape", lambda name: TINY)
    state = torch.get_rng_state()
    found = check_speed("tiny", ["bf16", "int4-g128"], 8, 4, rounds=2)
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    for one in found.values():
        assert 0 < one["ratio"].low <= one["ratio"].value <= one["ratio"].high
        assert one["whole"].unit == "ms" and "3 x one layer + head" in one["sum"].method


def test_compressing_several_layers_is_held_against_as_many_times_one(monkeypatch):
    order = []

    def cost(shape, recipe, samples, length, seed, layers):
        order.append(layers)
        return Cost(1, 100.0 if len(order) <= 2 else 2.0 * layers + 1, 0, 0, 0, 4, 1, 1, "int4-g128")

    monkeypatch.setattr(check, "cost_of", cost)
    monkeypatch.setattr(check, "in_child", lambda function, *arguments: function(*arguments))
    found = check_compression("reference-2", 1, 8)
    assert list(found) == list(check.CHECKED)
    first = found[check.CHECKED[0]]
    assert (first["whole"].value, first["sum"].value, first["ratio"].n) == (9, 12, check.REPEATS)
    assert first["ratio"].value == pytest.approx(9 / 12), "the first turn, slow as it was, does not count"
    assert order[:4] == [4, 1, 1, 4]
