"""Figures of layers say what they measure: errors of linears, or how far blocks turn what reaches them."""

import numpy as np
import pandas
import pytest

from qlib.report import layer_figures, layer_frames, lesson_figures

PATCHES = [{"block": 1, "error_plain": 0.6, "error": 0.5}]


@pytest.mark.parametrize(
    "patches, label, words",
    [
        (PATCHES, "1 - cosine of a block\nRelative error at a gap", "gap is 0.6 at block 1; gap, patched is 0.5 at block 1."),
        ([], "1 - cosine of a block", "1 - cosine is least with 0.1 at block 1 and largest with 0.9 at block 0."),
    ],
)
def test_influences_of_blocks_are_not_called_relative_errors(patches, label, words):
    depth = {"gone": [1], "influence": [0.9, 0.1, 0.2], "patches": patches}
    frame = layer_frames.pruned_frame({"depth": depth}, "short")
    assert layer_figures.layer_errors(frame).axes[0].get_ylabel() == label
    assert layer_frames.layer_alt(frame).endswith(words)


def test_errors_of_linears_are():
    frame = layer_frames.pruned_frame({"layers": [{"name": "model.layers.1.mlp.up_proj", "error": 0.5}]}, "masked")
    assert layer_figures.layer_errors(frame).axes[0].get_ylabel() == "Relative error"
    assert layer_frames.layer_alt(frame).startswith("The error is largest in up_proj of block 1 with 0.5")


def test_errors_by_linear_has_a_panel_for_each_kind_and_a_line_for_each_method():
    rows = [
        {"block": block, "linear": linear, "method": method, "error": error + block}
        for block in range(3)
        for linear in ("q", "k", "v", "o", "up")
        for method, error in (("first", 0.5), ("second", 0.1))
    ]
    figure = lesson_figures.errors_by_linear(pandas.DataFrame(rows))
    shown = [axes for axes in figure.axes if axes.axison]
    assert [axes.get_title() for axes in shown] == ["q", "k", "v", "o", "up"]
    assert all(np.allclose([line.get_ydata() for line in axes.lines[:2]], [[0.5, 1.5, 2.5], [0.1, 1.1, 2.1]]) for axes in shown)
    assert [axes.get_xlabel() for axes in shown] == ["", "Block", "Block", "Block", "Block"]
    assert all(axes.get_ylim()[1] > 2.5 for axes in shown)
    nothing = pandas.DataFrame(columns=["block", "linear", "method", "error"])
    assert lesson_figures.errors_by_linear(nothing).axes
