"""When sparse products pay, on the page: the frame holds every time, the words say the finding, the figure draws it."""

from dataclasses import asdict

import numpy as np
import pytest

from qlib.bench.bench_sparse import BATCHES, BLOCKS, SPARSITIES, sparse_row
from qlib.bench.rows import missing
from qlib.report.bench import sparse_alt, sparse_frame
from qlib.report.bench_figures import sparse_times
from qlib.report.show import figure_html


def rows(at: float) -> list[dict]:
    """As the benchmark makes them; CSR takes as long as bf16 at the sparsity `at`, BSR half as long as CSR."""
    found = []
    for batch in BATCHES:
        times = {"bf16": [10.0 * batch] * 3, "int4-g128": [2.0 * batch] * 3}
        for kind, share in zip(BLOCKS, (1, 0.5)):
            times |= {f"{kind} {s:g}": [10 * batch * share * (1 - s) / (1 - at)] * 3 for s in SPARSITIES}
        times = {name: np.array(values) for name, values in times.items()}
        found += [asdict(sparse_row(kind, batch, times, "fp32, F.linear")) | {"benchmark": "sparse"} for kind in BLOCKS]
    return found


def test_every_time_is_a_row_of_the_frame():
    frame = sparse_frame([*rows(0.8), {"benchmark": "layer", "name": "x", "measured": 1.0, "how": "0.5: 1.0 ms"}])
    assert len(frame) == len(BATCHES) * (len(BLOCKS) * len(SPARSITIES) + 2)
    one = frame[(frame["rows"] == 16) & (frame["kernel"] == "BSR")]
    assert list(one["sparsity"]) == list(SPARSITIES) and set(one["crossing"].round(6)) == {0.6}
    assert np.allclose(one["ms"], [80 * (1 - s) / 0.2 for s in SPARSITIES], atol=0.005)
    dense = frame[frame["sparsity"].isna()]
    assert list(dense["kernel"]) == ["bf16", "int4-g128"] * 2 and list(dense["ms"]) == [10, 2, 160, 32]


def test_the_words_tell_where_it_pays():
    words = sparse_alt(sparse_frame(rows(0.8)))
    first = "With 1 row CSR is faster than bf16 from a sparsity of 0.8 on and at 0.5 takes 2.5 times as long"
    assert words.startswith(f"{first}; it passes dense int4 by 0.98. With 1 row BSR")
    assert words.count("With 16 rows") == 2 and words.endswith(".")
    words = sparse_alt(sparse_frame(rows(0.998)))
    assert "CSR is never faster than bf16 and at 0.5 takes 2.5e+02 times" in words and "it never passes dense int4" in words


def test_the_figure_draws_a_panel_for_each_batch():
    figure = sparse_times(sparse_frame(rows(0.8)))
    assert [axes.get_title() for axes in figure.axes] == ["1 row", "16 rows"]
    assert len({axes.get_yscale() for axes in figure.axes} | {axes.get_xscale() for axes in figure.axes}) == 1
    lines = {line.get_label(): line for line in figure.axes[1].lines}
    assert list(lines) == ["CSR", "BSR", "dense bf16", "dense int4-g128"]
    assert np.allclose(lines["CSR"].get_xdata(), 1 - np.array(SPARSITIES)) and lines["CSR"].get_ydata()[0] == 400
    assert set(lines["dense bf16"].get_ydata()) == {160}
    html = figure_html(figure, "sparse", "c", "a", sparse_frame(rows(0.8)))
    assert "Sparsity" in html and "dense int4-g128" in html and ">0.95<" in html


NAME = "72B down_proj, 1 row: sparsity from which CSR is faster than bf16"


@pytest.mark.parametrize("found", [[], [asdict(missing(NAME, "<= 0.5", "fraction", "no MKL"))]])
def test_what_was_not_measured_says_so(found):
    frame = sparse_frame([row | {"benchmark": "sparse"} for row in found])
    assert frame.empty and sparse_alt(frame) == "Sparse products were not measured here."
    assert "Sparse products were not measured here." in figure_html(sparse_times(frame), "sparse", "c", "a")
