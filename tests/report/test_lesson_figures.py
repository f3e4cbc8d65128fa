"""Figures of lessons: what is drawn is what the frame holds."""

import numpy as np
import pandas

from qlib.report import lesson_figures


def test_channel_maxima_has_a_row_for_each_treatment_and_a_column_for_each_case():
    parts = [
        pandas.DataFrame({"case": case, "treatment": treatment, "channel": range(4), "share": np.linspace(high, 1, 4)})
        for case, high in (("plain", 0.5), ("outlier", 0.1))
        for treatment in ("as it is", "smoothed", "rotated")
    ]
    figure = lesson_figures.channel_maxima(pandas.concat(parts))
    assert len(figure.axes) == 6
    assert [axes.get_title() for axes in figure.axes[:2]] == ["Plain", "Outlier"]
    assert [axes.get_ylabel() for axes in figure.axes[::2]] == ["As it is", "Smoothed", "Rotated"]
    heights = [segment[1, 1] for segment in figure.axes[1].collections[0].get_segments()]
    assert np.allclose(heights, np.linspace(0.1, 1, 4))


def test_channel_maxima_of_nothing():
    columns = ["case", "treatment", "channel", "share"]
    assert lesson_figures.channel_maxima(pandas.DataFrame(columns=columns)).axes
