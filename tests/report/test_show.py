"""Figures and tables say what they are, look the same every time, and trust no text."""

import re

import pandas
import pytest

from qlib.errors import UserError
from qlib.report import figures, frames, layer_figures, layer_frames, record_frames, tables
from qlib.report.html import Cell, Column, Group, Table, mark_best
from qlib.report.show import figure_html, show_table, summary

EVIL = '<script>alert("x")</script>'


def frame():
    return pandas.DataFrame({"tokens": [1e6, 2e6], "loss": [3.0, 2.5], "series": ["run", "run"]})


def test_a_figure_is_labelled_themed_and_the_same_every_time():
    words = ("loss", "Loss.", "It falls.", frame())
    first, second = (figure_html(figures.loss_curve(frame()), *words) for _ in range(2))
    assert first == second
    assert 'role="img" aria-label="It falls."' in first and "<title>It falls.</title>" in first
    assert "var(--ink, #1b1f24)" in first and "var(--blue, #0072b2)" in first
    assert "<text" in first and "<dc:date>" not in first and "DOCTYPE" not in first
    assert "<details><summary>Data</summary>" in first


def test_two_figures_share_no_id():
    pages = [figure_html(figures.loss_curve(frame()), name, "c", "a") for name in ("one", "two")]
    one, two = (set(re.findall(r'\bid="([^"]+)"', page)) for page in pages)
    assert one and not one & two
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', pages[0]))
    assert used <= one


def test_texts_are_escaped():
    page = figure_html(figures.loss_curve(frame()), EVIL, EVIL, EVIL, frame().assign(series=EVIL))
    page += show_table([EVIL, Column(EVIL, EVIL, EVIL)], [[EVIL, Cell(EVIL, (EVIL,), EVIL, EVIL)]], EVIL)._repr_html_()
    page += Table([Column("a")], [Group(EVIL, EVIL)], EVIL, EVIL)._repr_html_()
    assert "<script" not in page and 'alert("' not in page


@pytest.mark.parametrize("missing", ["id", "caption", "alt"])
def test_a_figure_needs_words(missing):
    words = {"id": "x", "caption": "c", "alt": "a"} | {missing: " "}
    with pytest.raises(UserError, match=missing):
        figure_html(None, **words)


def test_a_table_aligns_numbers_and_names_what_is_absent():
    page = show_table(["Name", "Share", "Count"], [["a", 1.5, 3], ["b", None, 20_000]], "Shares", "s")._repr_html_()
    assert '<td class="num">1.50</td>' in page and "not measured" in page and "20,000" in page
    assert page.count('scope="col"') == 3 and page.count('scope="row"') == 2 and "<caption>" in page
    with pytest.raises(UserError, match="2 values"):
        show_table(["a"], [["x", "y"]], "c")


def test_the_best_is_marked_in_words(make):
    values = [make.number(v, "percent") for v in (99.0, 90.0, 80.0)]
    cells = mark_best([Cell("99"), Cell("90"), Cell("80")], values, "higher", [False, True, True])
    assert [cell.mark for cell in cells] == ["", "best", ""]


def test_summary_lists_every_measurement(book):
    record = book.get("rtn-int4").record
    page = summary(record)._repr_html_()
    assert page.count('scope="row"') == len(record["measurements"])
    assert "17.4" in page and "3,120" in page
    assert summary(record["measurements"])._repr_html_()


def test_the_articles_table_holds_claims_and_findings(book):
    page = tables.article_table(book)._repr_html_().replace("\N{NO-BREAK SPACE}", " ")
    for text in ("150 MB", "93.8 %", "rtn-int4", "76.4 s on cpu", "764 ms on nvidia-h200", "MMLU 73.4 for int4"):
        assert text in page
    assert "not measured (random weights)" in page


def test_families_without_a_record_read_not_measured_yet(tmp_path):
    from qlib.report.article import CLAIMS
    from qlib.report.book import collect

    page = tables.article_table(collect(tmp_path, tmp_path))._repr_html_()
    assert page.count("not measured yet") == 5 * len(CLAIMS) and "<td></td>" not in page


def test_no_speedup_is_ever_the_best(book):
    page = tables.speed_table(book.speed["qwen-72b"]["cpu"])._repr_html_()
    assert "no measurable difference" in page
    assert "no measurable difference</strong>" not in page
    assert "decode: int4pack; prefill: dequantize" in page and "not recorded" in page


def test_failures_tell_how_to_run_them_again(book):
    page = tables.failures(book)._repr_html_()
    assert "qlib run params/gptq-int4.yaml" in page and "cell 3 (compress)" in page
    assert tables.failures(type(book)(())) is None


def test_every_figure_draws_full_and_empty(book):
    found = [{"name": f"blocks.{i}.{k}", "error": 0.1} for i in range(2) for k in ("q_proj", "up")]
    layers = layer_frames.layer_frame(found)
    drawn = {
        figures.pareto: frames.pareto_frame(book),
        figures.accuracy_deltas: frames.delta_frame(book),
        figures.accuracy_by_level: frames.level_frame(book),
        figures.speed_bars: frames.speed_frame(book),
        layer_figures.layer_errors: layers,
        figures.loss_curve: record_frames.curve_frame([[0, 9.0], [1000, 3.0]]),
    }
    for draw, data in drawn.items():
        assert len(data), draw.__name__
        for rows in (data, data.iloc[:0]):
            assert "<svg" in figure_html(draw(rows), draw.__name__, "c", "a")


def test_alternative_texts_follow_the_data(book):
    assert "rtn-int4" in frames.pareto_alt(frames.pareto_frame(book))
    assert "rtn-int2 changes most" in frames.delta_alt(frames.delta_frame(book))
    assert "int4-g128 is fastest" in frames.speed_alt(frames.speed_frame(book))
    assert frames.pareto_alt(frames.pareto_frame(book).iloc[:0]) == "Nothing has been measured yet."


def test_the_front_holds_what_no_other_beats(book):
    data = frames.pareto_frame(book)
    front = figures.pareto_front(data, "disk", "accuracy")
    assert list(front["strategy"]) == ["rtn-int2", "rtn-int3", "rtn-int4", "rtn-int8"]
