"""The rule of thumb keeps its budget, favours both ends alike, and is followed by the pass that rounds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlib.compress import compress
from qlib.errors import UserError
from qlib.layers import packed_layers
from qlib.models.load import load
from qlib.quantize.keep_ends import Options, wide_blocks

WIDTHS = (2, 3, 4, 5, 6, 8)


@st.composite
def choices(draw):
    low, high = sorted(draw(st.lists(st.sampled_from(WIDTHS), min_size=2, max_size=2, unique=True)))
    return Options(draw(st.floats(low, high)), low, high)


@given(choices(), st.lists(st.integers(1, 10**9), min_size=1, max_size=90))
def test_the_average_is_within_the_budget_and_one_more_block_would_break_it(options, sizes):
    wide = wide_blocks(sizes, options)
    order = sorted(range(len(sizes)), key=lambda index: (min(index, len(sizes) - 1 - index), index))

    def average(chosen):
        bits = sum(size * (options.high if index in chosen else options.low) for index, size in enumerate(sizes))
        return bits / sum(sizes)

    assert wide == set(order[: len(wide)])
    assert average(wide) <= options.budget * (1 + 1e-9)
    if len(wide) < len(sizes):
        assert average(order[: len(wide) + 1]) > options.budget * (1 - 1e-9)


@pytest.mark.parametrize("budget, wide", [(3, []), (4, [0, 1, 5]), (3.4, [0]), (5, [0, 1, 2, 3, 4, 5])])
def test_turns_from_both_ends(budget, wide):
    assert sorted(wide_blocks([7] * 6, Options(budget))) == wide


@pytest.mark.parametrize(
    "given, words",
    [
        ({"budget": 2.9}, "budget: 2.9 is not allowed; allowed: 3 to 5 bits"),
        ({"low": 5}, "high: 5 is not allowed; allowed: more bits than low, 5"),
    ],
)
def test_options_that_cannot_be_met_are_refused(given, words):
    with pytest.raises(UserError) as caught:
        Options(**given)
    assert str(caught.value) == words


def test_the_later_pass_follows(model_folder):
    plan = {"pass": "keep_ends", "low": 3, "high": 8, "budget": 5.5, "group_size": 32}
    subject = compress(load(str(model_folder())), [plan, {"pass": "rtn", "group_size": 32}])
    chosen = {name: layer.grid.name for name, layer in packed_layers(subject.model).items()}
    assert all(name == ("int8" if "layers.0." in path else "int3-g32") for path, name in chosen.items())
    assert subject.details["allocation"] == {path: 8 if name == "int8" else 3 for path, name in chosen.items()}


def test_a_group_size_that_does_not_divide_is_refused(model_folder):
    recipe = [{"pass": "keep_ends"}, {"pass": "rtn", "group_size": 32}]
    with pytest.raises(UserError, match=r"recipe\[0\]\.group_size: 128 does not divide the 64 input channels of"):
        compress(load(str(model_folder())), recipe)
