"""A record of a true shape on the page: what was measured once, what is extrapolated, and what was not measured."""

import pytest

from qlib.errors import UserError
from qlib.report import scale_figures, scale_tables
from qlib.report.book import Book, Entry
from qlib.report.fill import book_words, entry_words
from qlib.report.scale_frames import (
    SENTENCES, check_alt, check_frame, methods_alt, methods_frame, sentence, sizes_alt, sizes_frame,
)  # fmt: skip
from qlib.report.show import svg


def measured(value, unit="ratio", spread=0.05):
    found = {"value": value, "unit": unit, "n": 6, "low": value - spread, "high": value + spread}
    return found | {"conditions": "small, 24 layers"}


def compared(whole, summed, ratio, unit):
    return {"whole": measured(whole, unit), "sum": measured(summed, unit), "ratio": measured(ratio)}


def method(seconds, format="int4-g128"):
    cost = {"seconds": seconds, "peak_bytes": 3e9, "stored_bytes": 4.5e8, "bits_per_weight": 4.156, "format": format}
    return {"title": f"T{seconds}", "family": "weight_quantization", "foretold_seconds": 7.0} | cost


@pytest.fixture()
def record():
    formats = {
        f: {"size.disk_bytes": measured(size, "bytes"), "latency.decode_ms": measured(decode, "ms"),
            "latency.prefill_ms": measured(9.0, "ms")}
        for f, size, decode in (("bf16", 1e9, 50.0), ("int4-g128", 4e8, 20.0))
    }  # fmt: skip
    late = {"title": "Late", "family": "weight_quantization", "format": "int4-g128", "reason": "would take about 26 min"}
    never = {"title": "Never", "family": "weight_quantization", "reason": "it needs all"}
    check = {
        "model": "qwen2.5-0.5b", "compressed": "tiny",
        "speed": {f"{f} decode": compared(10, 9, 1.1, "ms") for f in formats},
        "compression": {"gptq": compared(4, 4, 1.0, "seconds")},
    }  # fmt: skip
    slope = measured(0.97, "exponent", 0.01) | {"farthest": 1.2}
    slopes = {part: {f: slope for f in formats} for part in ("decode", "prefill")}
    details = {
        "layers": 80, "methods": {"slow": method(90.0), "quick": method(4.5), "late": late, "never": never},
        "check": check, "slopes": slopes,
        "sizes": {name: {"parameters": count, "formats": formats} for name, count in (("a", 5e8), ("b", 7.2e10))},
    }  # fmt: skip
    names = {"name": "scale-72b", "family": "scale", "model": "qwen-72b"}
    return names | {"formats": {"quick": formats["int4-g128"]}, "details": details}


def test_methods_are_measured_for_a_layer_and_extrapolated_to_all(record):
    frame = methods_frame(record)
    assert list(frame["method"]) == ["quick", "slow"] and list(frame["hours"]) == [80 * 4.5 / 3600, 80 * 90 / 3600]
    assert "quick takes 4.5 seconds" in methods_alt(frame) and "2 hours; each method was run once" in methods_alt(frame)
    html = scale_tables.methods_table(record)._repr_html_()
    assert "Extrapolated to 80 layers" in html and "n = 1" in html and "One layer, measured once" in html
    assert "Not measured: would take about 26 min." in html and "Not measured: it needs all." in html
    assert "Narrower layers foretold 7 s." in html


def test_sentences_tell_numbers_with_intervals(record):
    words = {name: sentence(name, record) for name in SENTENCES}
    assert words["methods"].startswith("2 of 4 methods were run on one layer, once each: quick takes 4.5 s, slow 90 s")
    assert "extrapolated to 80 layers that is 0.1 to 2 hours. Not measured: late, never." in words["methods"]
    plain = words["line"].replace("\N{NO-BREAK SPACE}", " ")
    assert "with the power 0.970 (0.960 to 0.980) in bf16" in plain and "a factor of 1.20 off" in plain
    assert "bf16 decode 1.10× (1.05 to 1.15)" in words["check"].replace("\N{NO-BREAK SPACE}", " ")


def test_tables_and_figures_hold_what_the_record_holds(record):
    sizes, ratios = sizes_frame(record), check_frame(record)
    assert list(sizes["parameters"]) == [0.5, 0.5, 72, 72] and set(sizes["format"]) == {"bf16", "int4-g128"}
    assert "From 0.5 to 72 billion parameters: in bf16 size goes from 1 to 1 gigabytes" in sizes_alt(sizes)
    assert list(ratios["ratio"]) == [1.1, 1.1, 1.0] and "gptq 1; 1 is a perfect" in check_alt(ratios)
    assert len(scale_tables.check_table(record).rows) == 3 and len(scale_tables.sizes_table(record).rows) == 2
    drawn = {
        "slow": scale_figures.method_times(methods_frame(record)),
        "bf16": scale_figures.size_lines(sizes),
        "gptq": scale_figures.whole_ratios(ratios),
    }
    for word, figure in drawn.items():
        assert word in svg(figure, "x", "alt")


def test_without_a_record_everything_says_so():
    assert all("not" in sentence(name, None) for name in SENTENCES)
    for table in (scale_tables.methods_table, scale_tables.check_table, scale_tables.sizes_table):
        assert not table({}).rows and "Not measured here" in table({}).caption
    draws = scale_figures.method_times, scale_figures.size_lines, scale_figures.whole_ratios
    for frame, draw in zip((methods_frame, sizes_frame, check_frame), draws):
        assert frame({}).empty and "not" in svg(draw(frame({})), "x", "alt").lower()


def test_placeholders_find_the_record(record, tmp_path):
    entry = Entry("scale-72b", "scale", "done", "qwen-72b", "cpu", tmp_path, record)
    book = Book((entry,))
    assert book.scale is entry and not book.strategies, "it is no row of the report"
    assert entry_words(entry)("check") == book_words(book)("true shape: check") == sentence("check", record)
    assert entry_words(entry)("quick.latency.decode_ms").startswith("20.0")
    assert "not measured" in book_words(Book(()))("true shape: methods")
    with pytest.raises(UserError, match="unknown .did you mean 'line'"):
        book_words(book)("true shape: lines")
