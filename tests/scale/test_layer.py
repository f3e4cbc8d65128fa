"""One layer by every method: sizes by arithmetic, what narrower layers foretell, and what is not measured says why."""

import pytest
import torch

from qlib.errors import UserError
from qlib.evaluate.footprint import shape_footprint
from qlib.models.shapes import SHAPES, Shape
from qlib.scale import layer
from qlib.bench.child import in_child
from qlib.scale.layer import Cost, Limits, compress_layer, cost_of, foretold, narrower
from qlib.scale.methods import METHODS, Method

TINY = Shape("tiny", 3, 256, 4, 2, 384, 96, head_dim=64)
FAST = [name for name, method in METHODS.items() if not method.never and name != "signround-int4"]


def cost(parameters, seconds):
    return Cost(parameters, seconds, 0, 0, 0, 4.0, 1, 1.0, "int4-g128")


@pytest.fixture()
def here(monkeypatch):
    """Children in this process, on a tiny shape."""
    monkeypatch.setattr(layer, "in_child", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(layer, "find_shape", lambda name: TINY)
    return monkeypatch


@pytest.mark.parametrize("name", FAST)
def test_a_layer_has_the_size_that_arithmetic_gives_its_format(name):
    state = torch.get_rng_state()
    found = cost_of(TINY, list(METHODS[name].recipe), samples=2, length=32)
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    expected = shape_footprint(TINY, found.format, found.weights_kept)
    assert found.bits_per_weight == pytest.approx(expected["size.bits_per_weight"]["value"], rel=1e-3)
    assert found.tokens == (0 if name in ("rtn-int4", "hqq-int4") else 64)
    assert found.weights_kept == (pytest.approx(0.5, abs=0.02) if {"sparsity"} & set(METHODS[name].recipe[0]) else 1)
    assert found.seconds > 0 and found.parameters == TINY.layer_parameters


def test_width_pruning_leaves_fewer_weights_and_says_so_in_its_format():
    found = cost_of(TINY, list(METHODS["width-pruned"].recipe), 2, 32)
    left = TINY.narrowed(0.653, 0.653)
    assert found.format == "bf16@0.653" and found.stored_bytes == 2 * left.linear_parameters < 2 * TINY.linear_parameters


def test_several_layers_are_so_many_times_as_large():
    one, three = (cost_of(TINY, list(METHODS["rtn-int4"].recipe), 1, 8, layers=layers) for layers in (1, 3))
    assert (three.stored_bytes, three.parameters) == (3 * one.stored_bytes, 3 * one.parameters)


@pytest.mark.parametrize("shape", [*SHAPES.values(), TINY], ids=lambda shape: shape.name)
@pytest.mark.parametrize("by", layer.NARROWER)
def test_narrower_layers_take_the_same_formats(shape, by):
    small = narrower(shape, by)
    assert all(columns % 128 == 0 for _, columns in small.linears.values())
    assert small.heads // small.kv_heads == shape.heads // shape.kv_heads
    assert small.layer_parameters <= shape.layer_parameters
    if shape.name == "qwen-72b":  # its heads share no keys, so that all proportions can stay
        assert small.layer_parameters == pytest.approx(shape.layer_parameters / by**2, rel=0.1)


def test_a_power_law_is_followed_as_far_as_theory_allows():
    for power, followed in ((1.25, 1.25), (0.5, 1.0), (2.0, 1.5)):
        costs = [cost(parameters, 1e-7 * parameters**power) for parameters in (1e6, 4e6)]
        assert foretold(costs, 64e6) == pytest.approx(costs[1].seconds * 16**followed)
    assert foretold([cost(1e6, 2.0)], 5e6) == pytest.approx(10), "in proportion"


def test_what_would_take_too_long_is_not_measured_and_says_why(here):
    seen = []

    def counted(shape, *given, **more):
        seen.append(shape.hidden)
        return cost(shape.layer_parameters, 2.0)

    here.setattr(layer, "cost_of", counted)
    here.setattr(layer, "NARROWER", (4, 2, 1))
    method = {"some": METHODS["gptq-int4"], "never": Method("N", "pruning", (), never="it cannot be")}
    found = compress_layer("x", 1, 8, methods=method, limits=Limits(seconds=2.1, weights=1))
    assert found["never"]["reason"] == "it cannot be" and "seconds" not in found["never"]
    assert found["some"]["reason"].startswith("would take about ") and "seconds" not in found["some"]
    assert seen == [128, 128], "after the first narrower layer foretold too much, nothing else ran"
    seen.clear()
    found = compress_layer("x", 1, 8, methods=method, limits=Limits(seconds=1e6, weights=1))
    assert found["some"]["seconds"] == 2.0 and seen == [128, 128, 256, 256] and len(found["some"]["narrower"]) == 2


def test_bad_input_is_refused_before_anything_runs(here):
    with pytest.raises(UserError, match="device: 'cuda' is not allowed here"):
        compress_layer("x", 1, 8, device="cuda")
    here.undo()
    with pytest.raises(UserError, match="no true shape is known for 'qwen-73b'"):
        compress_layer("qwen-73b", 1, 8)


def test_a_child_answers_raises_what_it_raised_and_its_death_is_told():
    assert in_child(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        in_child(divmod, 1, 0)
    with pytest.raises(RuntimeError, match="its process was killed"):
        in_child(os_exit, 9)


def os_exit(code):
    import os

    os._exit(code)
