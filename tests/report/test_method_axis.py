"""All quantization methods on one axis: what is drawn, in which mark, and what joins the front."""

import pytest

from qlib.report.book import Book, Entry
from qlib.report.method_axis import _marks, by_method, method_alt, method_frame, method_of, own_book
from qlib.report.show import svg


def entry(name, bits, ratio, recipe, family="weight_quantization", own=4.0):
    """A measured strategy; its perplexity is `ratio` times 5."""
    values = {"size.bits_per_weight": own, "size.bits_per_weight_total": bits, "quality.perplexity": 5 * ratio}
    found = {key: {"value": value} for key, value in values.items()}
    found["quality.perplexity_ratio"] = {"value": ratio, "low": ratio - 0.01, "high": ratio + 0.01}
    steps = [{"pass": one} for one in recipe]
    record = {"measurements": found}
    return Entry(name, family, "done", "reference-2", "cpu", None, record, params={"recipe": steps})


@pytest.fixture
def book():
    return Book(
        (
            entry("plain", 4.16, 1.2, ["rtn"]),
            entry("turned", 4.2, 1.1, ["rotate", "gptq"]),
            entry("solved", 4.16, 1.15, ["gptq"]),
            entry("wide", 8.1, 1.001, ["rtn"]),
            entry("wider", 9.1, 1.002, ["gptq"]),
            entry("cache", 16.0, 1.0, ["kv_cache"], own=16.0),
            entry("guest", 3.1, 1.6, ["tool"], "tool"),
            entry("sparse", 3.0, 1.0, ["wanda"], "pruning"),
        )
    )


def test_a_method_is_the_first_pass_of_the_recipe_and_another_family_itself(book):
    found = dict(zip(*(method_frame(book, "reference-2")[name] for name in ("strategy", "method"))))
    assert found == {"plain": "rtn", "turned": "rotate", "solved": "gptq", "wide": "rtn", "wider": "gptq"} | {
        "guest": "Outside tools"
    }
    assert method_of(entry("none", 16, 1, [])) == "Weight quantization"


def test_growth_and_its_interval_are_of_the_paired_ratio(book):
    row = method_frame(book, "reference-2").set_index("strategy").loc["turned"]
    assert row["growth"] == pytest.approx(10) and row["perplexity"] == pytest.approx(5.5)
    assert (row["growth_low"], row["growth_high"]) == pytest.approx((9, 11))


def test_a_missing_record_or_interval_is_no_failure(book):
    no_ends = entry("bare", 5.0, 1.05, ["awq"])
    no_ends.record["measurements"]["quality.perplexity_ratio"] = {"value": 1.05}
    nothing = Entry("failed", "weight_quantization", "failed", "reference-2", "cpu", None)
    frame = method_frame(Book((*book.entries, no_ends, nothing)), "reference-2")
    assert "bare" in set(frame["strategy"]) and "failed" not in set(frame["strategy"])
    assert "bare" in svg(by_method(frame), "fig-bare", "Bare")
    empty = method_frame(Book(()), "reference-2")
    assert empty.empty and by_method(empty).axes and method_alt(empty) == "Nothing has been measured yet."


def test_only_the_front_is_named_and_a_tenth_of_a_bit_is_no_difference(book):
    frame = method_frame(book, "reference-2")
    drawn = svg(by_method(frame), "fig-methods", "Methods")
    named = [name for name in frame["strategy"] if f">{name}<" in drawn]
    assert named == ["turned", "wide", "guest"]
    words = method_alt(frame)
    assert "Of 6 strategies by 4 methods, 3 are beaten" in words and "+0.1 %" in words
    assert "turned (4.2 bits per weight, perplexity +10 %)" in words and "1 by rotate" in words


def test_ticks_say_perplexity_and_distance(book):
    axes = by_method(method_frame(book, "reference-2")).axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels[0] == "5.00\nbf16" and "5.50\n+10 %" in labels


def test_no_two_methods_share_colour_marker_and_filling(book):
    many = [entry(f"s{i}", 4 + i / 10, 1.1, [f"method{i}"]) for i in range(11)]
    marks = _marks(method_frame(Book((*book.entries, *many)), "reference-2"))
    assert len(set(marks.values())) == len(marks) == 15


def test_a_lesson_finds_the_runs_it_is_one_of(monkeypatch, tmp_path, make):
    runs = tmp_path / "runs"
    make.write(runs / "m" / "cpu" / "mine", make.record("mine", "weight_quantization", {}, model="m"))
    monkeypatch.setenv("QLIB_RUN_DIR", str(runs / "m" / "cpu" / "lesson-x" / "work"))
    assert "mine" in [found.name for found in own_book().entries]
