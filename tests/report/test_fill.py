"""Placeholders are filled from records, escaped, and refused by name where they mean nothing."""

import pytest

from qlib.errors import UserError
from qlib.report.fill import book_words, entry_words, fill
from qlib.report.numbers import SPACE


def filled(text, resolve):
    return fill(text, resolve, "notebooks/x.ipynb: cell abc").replace(SPACE, " ")


def test_a_strategys_notebook(book):
    resolve = entry_words(book.get("rtn-int4"))
    assert filled("is {{ quality.perplexity }}.", resolve) == "is 17.40 (17.08 to 17.72)."
    assert filled("{{quality.accuracy.value}}", resolve) == "90.5 %"
    assert filled("{{ quality.accuracy.interval }}", resolve) == "89.6 to 91.4"
    assert filled("{{ quality.accuracy.n }}", resolve) == "3,120"
    assert filled("{{ duration }}, {{ peak_memory }}, {{ parameters }}", resolve) == "1 min 23 s, 512 MB, 1,500,000"


def test_the_speed_notebook(book):
    resolve = entry_words(book.speed["qwen-72b"]["cpu"])
    assert filled("{{ int4-g128.latency.decode_ms.value }} of {{ model }}", resolve) == "950 ms of qwen-72b"


def test_the_report(book):
    resolve = book_words(book)
    assert filled("{{ rtn-int4: quality.perplexity.value }}", resolve) == "17.40"
    assert filled("{{ speed-qwen-72b: int4-g128.latency.decode_ms.value }}", resolve) == "950 ms"
    assert filled("{{ speed-qwen-72b: int8.latency.prefill_speedup }}", resolve) == "no measurable difference"
    assert filled("{{ verdict: rtn-int4 }}", resolve).startswith("keeps at least 99 %")
    assert filled("{{ verdict: gptq-int4 }}", resolve) == "has not been compared with the baseline"
    assert filled("{{ finding }}", resolve).startswith("Of 8 compressed strategies")
    assert filled("{{ family: pruning }}", resolve).startswith("0 of 2 keep at least 99 %")


def test_a_record_of_training_precisions(tmp_path, make):
    from qlib.report.book import collect

    formats = {"bf16": {"train.tokens_per_second": make.number(9000, "tokens/s")}}
    record = make.record("precisions", "training", {}, formats=formats)
    make.write(tmp_path / "reference-2" / "cpu" / "precisions", record)
    book = collect(tmp_path, tmp_path / "none")
    assert filled("{{ bf16.train.tokens_per_second }}", entry_words(book.training)) == "9,000 tokens/s"
    assert filled("{{ precisions: bf16.train.tokens_per_second }}", book_words(book)) == "9,000 tokens/s"


@pytest.mark.parametrize("name", ["gptq-int4: quality.perplexity", "never-run: quality.kl", "speed-none: int4.x"])
def test_what_failed_or_never_ran_is_not_measured(book, name):
    book = type(book)(book.entries, book.known | {"speed-none"})
    resolve = book_words(book)
    name = name.replace("int4.x", "int4.latency.decode_ms")
    assert filled(f"{{{{ {name} }}}}", resolve) == "not measured"
    assert filled("{{ quality.perplexity }}", entry_words(None)) == "not measured"


@pytest.mark.parametrize(
    "text, hint",
    [
        ("{{ rtn-int4: quality.perplexty }}", "did you mean 'quality.perplexity'"),
        ("{{ rtn-int44: quality.kl }}", "did you mean 'rtn-int4'"),
        ("{{ findin }}", "did you mean 'finding'"),
        ("{{ speed-qwen-72b: int4-g12.latency.decode_ms }}", "did you mean 'int4-g128'"),
        ("{{ speed-qwen-72b: latency }}", "a format and a measurement"),
        ("{{ family: prunning }}", "did you mean 'pruning'"),
        ("{{ }}", "unknown"),
    ],
)
def test_an_unknown_placeholder_is_refused(book, text, hint):
    with pytest.raises(UserError, match="notebooks/x.ipynb: cell abc: placeholder") as error:
        filled(text, book_words(book))
    assert hint in str(error.value)


def test_values_are_escaped_for_markdown_and_html(book):
    text = filled("{{ evil: protocol }} {{ evil: title }} {{ evil: quality.kl.method }}", book_words(book))
    assert "<" not in text and '"' not in text and "&#60;script&#62;" in text
