"""What the adapters share, against brute force; none of the tools is needed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlib.errors import UserError
from qlib.evaluate.items import Item
from qlib.quantize.tool import Options
from qlib.tools.adapter import bits_per_weight, on_grid, put_weights
from qlib.tools.exam import Exam, read_exam, write_exam


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 5), st.integers(1, 4), st.sampled_from([2, 3, 4]), st.booleans(), st.integers(0, 2**31))
def test_values_on_the_grid_survive_a_coarser_dtype(rows, groups, bits, ordered, seed):
    generator = torch.Generator().manual_seed(seed)
    scales = (torch.rand(rows, groups, generator=generator) + 0.1).float()
    codes = torch.randint(1 - 2**bits, 2**bits, (rows, 32 * groups), generator=generator)  # code - zero
    index = torch.arange(groups).repeat_interleave(32)
    if ordered:
        index = index[torch.randperm(len(index), generator=generator)]
    exact = codes.double() * scales.double()[:, index]
    stored = scales.half()
    found = on_grid(exact.bfloat16(), scales, index if ordered else None, stored)
    torch.testing.assert_close(found.double(), codes.double() * stored.double()[:, index], rtol=1e-6, atol=0)


def test_bits_per_weight_counts_scales_zeros_and_order():
    weights = {"a": torch.zeros(8, 256), "b": torch.zeros(16, 128)}
    assert bits_per_weight(weights, Options(bits=3, group_size=128)) == 3 + 19 / 128
    assert bits_per_weight(weights, Options(bits=3, group_size=128), zeros=False) == 3 + 16 / 128
    ordered = 32 * (256 + 128) / (8 * 256 + 16 * 128)
    assert bits_per_weight(weights, Options(bits=4, group_size=32), index=True) == 4 + 20 / 32 + ordered
    assert bits_per_weight({"a": torch.zeros(8, 256)}, Options(bits=8, group_size=None)) == 8 + 24 / 256


def test_weights_go_where_they_belong():
    model = torch.nn.Sequential(torch.nn.Linear(4, 3, dtype=torch.bfloat16))
    weight = torch.full((3, 4), 1 / 3)
    put_weights(model, {"0": weight})
    assert model[0].weight.dtype == torch.float32 and torch.equal(model[0].weight, weight)
    for wrong in ({"1": weight}, {"0": weight.T}):
        with pytest.raises(UserError, match="has no place in this model"):
            put_weights(model, wrong)


def test_a_setting_that_the_tool_lacks_is_refused():
    assert Options(damp=0.01).method == "GPTQ"
    with pytest.raises(UserError, match="iterations: is not supported by gptqmodel; leave it out"):
        Options(iterations=5)


def test_an_exam_survives_its_file(tmp_path):
    items = [Item(number, number % 3, (1, 2, number), ((4, 5), (6, 7), (8, 9), (1, 0))) for number in range(5)]
    exam = Exam(items, [(0, [3, 1, 4]), (2, [1]), (4, [5, 9, 2, 6])], 7, 5)
    write_exam(exam, tmp_path / "exam.npz")
    assert read_exam(tmp_path / "exam.npz") == exam
