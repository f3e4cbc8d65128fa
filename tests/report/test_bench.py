"""Benchmarks on the page: every target with its verdict in words, escaped; nothing where nothing was measured."""

import json

import numpy as np
import pytest

from qlib.report.bench import bench_table, bench_words, growth_alt, growth_frame, read_bench
from qlib.report.bench_figures import growth
from qlib.report.book import collect
from qlib.report.render import report_key
from qlib.report.show import figure_html

EVIL = "<script>alert(1)</script>"
MACHINE = {"cpu": "Zen 5", "threads": 2, "python": "3.11.7", "packages": {"torch": "2.13.0"}, "commit": "0123456789abc"}


def row(name, target, measured, met, spread=0.0, benchmark="layer", how="settings", **more):
    low, high = (None, None) if measured is None else (measured - spread, measured + spread)
    found = {"name": name, "target": target, "measured": measured, "unit": "times", "met": met}
    return found | {"low": low, "high": high, "how": how, "benchmark": benchmark} | more


ROWS = (
    row("faster", ">= 1.5", 2.0, True, 0.1),
    row("slower", ">= 1.2", 1.1, False),
    row("open", "not above 1", 1.05, None, 0.2),
    row(EVIL, "<= 3", None, None, benchmark="gptq", how=f"not measured: {EVIL}"),
)


def test_every_target_is_a_row_that_says_whether_it_is_met():
    page = bench_table(ROWS)._repr_html_()
    for words in ("at least 1.5", "at most 3", "not above 1", ">yes<", ">no<", ">not resolved<", ">not measured<"):
        assert words in page
    assert page.count('scope="rowgroup"') == 2 and "One true layer" in page  # what the benchmark says of itself
    assert "1.90\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}2.10" in page
    assert "1.10\N{NO-BREAK SPACE}to" not in page  # measured once: no interval
    assert "<script" not in page and "&lt;script&gt;" in page


def test_the_sentence_counts_and_names_machine_and_tools():
    assert bench_words(ROWS).startswith("4 targets: 1 met, 1 missed, 1 not resolved, 1 not measured. The file does not")
    later = [one | {"provenance": MACHINE | {"tools": {"gptqmodel": "5.0"}}} for one in ROWS]
    said = bench_words([*later, *ROWS])
    assert said.endswith("Zen 5, 2 threads, Python 3.11.7, torch 2.13.0, commit 0123456789. Tools: gptqmodel 5.0.")
    other = ROWS[0] | {"provenance": MACHINE | {"commit": "abcdef", "started": "2026-01-02T03:04:05", "tools": {"hqq": "0.2"}}}
    said = bench_words([*later, other])
    assert "commits 0123456789, abcdef, 2026-01-02. Tools: gptqmodel 5.0, hqq 0.2." in said and said.count("Zen 5") == 1


@pytest.mark.parametrize("content", [None, "{broken", '{"rows": 1}', "[1, 2]"])
def test_without_a_readable_file_nothing_was_measured(tmp_path, content):
    if content:
        (tmp_path / "bench.json").write_text(content)
    rows = read_bench(tmp_path / "bench.json")
    assert rows == () and bench_table(rows) is None
    assert bench_words(rows) == "These comparisons were not measured here: run make bench."
    assert "not measured" in growth_alt(growth_frame(rows))
    assert "Cost growth was not measured" in figure_html(growth(growth_frame(rows)), "growth", "c", "a")


def test_growth_follows_from_the_times_that_a_row_lists():
    seconds = {size: 2e-6 * size**2.5 for size in (1024, 2048, 4096)}
    spent = ", ".join(f"{size}: {value:.2f} s" for size, value in seconds.items())
    name = "gptq: exponent of time in the width of a square linear"
    frame = growth_frame([*ROWS, row(name, "<= 3", 2.5, True, benchmark="growth", how=f"4096 tokens; {spent}")])
    assert list(frame["size"]) == list(seconds) and set(frame["of"]) == {"width of a square linear"}
    assert np.allclose(frame["seconds"], list(seconds.values()), atol=0.005)
    assert "from 1024 to 4096" in growth_alt(frame) and "power of 2.5" in growth_alt(frame)
    assert "power 2.50" in figure_html(growth(frame), "growth", "c", "a")


def test_a_changed_file_changes_the_book_and_the_key_of_the_report(project):
    runs, published = project / "reports" / "runs", project / "reports" / "published"

    def key():
        return report_key(project / "notebooks" / "report.ipynb", runs, published, project / "params")

    keys = [key()]
    for rows in (ROWS, ROWS[:1]):
        (project / "reports" / "bench.json").write_text(json.dumps(rows))
        assert [one["name"] for one in collect(runs, published).bench] == [one["name"] for one in rows]
        keys.append(key())
    assert len(set(keys)) == 3
