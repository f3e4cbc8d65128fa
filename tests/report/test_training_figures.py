"""Frames and figures about training a single strategy."""

import pandas

from qlib.report import figures, lesson_figures, record_frames


def test_the_tokens_of_several_passes_are_counted_on():
    passes = [{"tokens": 100, "curve": [[50, 3.0], [100, 2.5]], "development": [[0, 3.2], [100, 2.6]]}] * 2
    frame = record_frames.passes_frame(passes)
    second = frame[frame["series"] == "development text 2 of 2"]
    assert second["tokens"].tolist() == [100, 200] and second["loss"].tolist() == [3.2, 2.6]
    assert set(record_frames.passes_frame(passes[:1])["series"]) == {"training", "development text"}
    assert record_frames.passes_frame([]).empty and figures.loss_curve(frame).axes


def test_the_path_of_a_weight_has_a_line_for_each_series_and_one_for_the_target():
    rows = [{"step": step, "value": value, "series": name} for name in "ab" for step, value in enumerate((0.0, 0.5, 1.0))]
    axes = lesson_figures.weight_path(pandas.DataFrame(rows), 0.75).axes[0]
    assert [0.75, 0.75] in [list(line.get_ydata()) for line in axes.lines] and len(axes.lines) >= 3
