"""The league of tools: places by perplexity, ties by paired intervals, speeds from the benchmark, failures in sight."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from qlib.report.book import collect
from qlib.report.fill import book_words
from qlib.report.league import beside, league_table, league_words, spent, speedup, standings, timed
from qlib.report.needs import needs_table
from qlib.report.tool_facts import fairness_table, ideas_table, tools_table
from qlib.report.tool_figures import league_frame, loss_alt, size_against_loss, time_against_loss, time_alt
from qlib.tools.about import tool_names

RUNS = [{"seconds": 3.0, "digest": "a"}, {"seconds": 2.0, "digest": "a"}, {"seconds": 2.5, "digest": "b"}]


def build(tmp_path, make):
    """At 4 bits: ours 2.2 nats, gptqmodel 2.21 (same noise), hqq as good as ours within noise, one failure."""
    folder = tmp_path / "reference-2" / "cpu"
    make.strategy(folder, "baseline", "baseline", [], 2.0, 9)
    told = {"name": "gptqmodel", "method": "GPTQ", "runs": RUNS, "threads": 2, "scored": "weights"}
    told |= {"ids": {"given": "0" * 64, "reached": "0" * 64, "same": True}, "uncompressed": {"its": 6.1, "ours": 6.1, "tokens": 9}}
    told |= {"facts": {"distribution": "gptqmodel", "licence": "Apache-2.0", "python": ">=3.11", "released": "2026-09-01"}}
    told |= {"versions": {"gptqmodel": "7.6.0"}}
    other = told | {"name": "llama-cpp", "ids": told["ids"] | {"reached": None, "same": None}, "method": "RTN"}
    for name, family, nats, seed, tool in (
        ("best-int4", "weight_quantization", 2.2, 0, None),
        ("tool-gptqmodel-int4", "tool", 2.21, 0, told),
        ("tool-llama-cpp-q4_0", "tool", 2.205, 5, other),
    ):
        recipe = [{"pass": "tool", "name": tool["name"], "bits": 4}] if tool else [{"pass": "signround", "bits": 4}]
        make.strategy(folder, name, family, recipe, nats, 8, spread=0.3, seed=seed)
        file = folder / name / "record.json"
        content = json.loads(file.read_text())
        content["measurements"]["size.bits_per_weight"] = make.number(4.5 if seed else 4.16, "bits")
        content["measurements"]["quality.perplexity_ratio"] = make.number(np.exp(nats - 2), "ratio")
        content["measurements"]["compress.seconds"] = make.number(9.0, "seconds")
        content["details"] = {"tool": tool} if tool else {}
        file.write_text(json.dumps(content))
    bench = {"benchmark": "tools", "name": "x", "met": True, "measured": 2.0, "target": ">= 1", "unit": "times", "facts": {
        "strategies": ["tool-gptqmodel-int4"], "phase": "decode", "speedup": [1.5, 1.4, 1.6], "ours_ms": [10, 9, 11], "bf16_ms": [30, 29, 31],
    }}  # fmt: skip
    return replace(collect(tmp_path, tmp_path / "none"), bench=(bench,))


def test_places_ties_and_sizes(tmp_path, make):
    book = build(tmp_path, make)
    (bits, members), *rest = standings(book).items()
    assert bits == 4 and not rest and [one.entry.name for one in members] == [
        "best-int4", "tool-llama-cpp-q4_0", "tool-gptqmodel-int4",
    ]  # fmt: skip
    assert [one.place for one in members] == [1, 2, 3]
    assert [one.tied for one in members] == [False, True, False]  # other noise: not resolved; the same noise: worse
    assert members[2].ratio["low"] > 1 and members[0].ours
    page = league_table(book)._repr_html_()
    assert "tied with the first" in page and "+0.34" in page and ">equal<" in page
    words = league_words(book)
    assert words.startswith("2 tools in 2 settings: with 4 bits best-int4 has the lowest perplexity")
    assert "and tool-llama-cpp-q4_0 ties with it" in words and book_words(book)("league") == words


def test_speeds_come_from_the_benchmark_and_times_from_repeats(tmp_path, make):
    book = build(tmp_path, make)
    ours, _, tool = standings(book)[4]
    assert timed(book, "tool-gptqmodel-int4", "decode")["speedup"] == [1.5, 1.4, 1.6]
    assert timed(book, "tool-gptqmodel-int4", "prefill") == {} == timed(book, "tool-llama-cpp-q4_0", "decode")
    assert speedup(book, tool, 4, "decode") == {"value": 1.5, "low": 1.4, "high": 1.6, "unit": "ratio"}
    assert speedup(book, ours, 4, "decode")["value"] == pytest.approx(3.0) and speedup(book, ours, 4, "prefill") is None
    assert spent(tool.entry) == {"value": 2.5, "unit": "seconds", "n": 3, "low": 2.0, "high": 3.0}
    assert spent(ours.entry)["value"] == 9.0


def test_a_tool_is_held_against_the_largest_of_ours_that_is_not_larger():
    def sized(name: str, bits: float | None):
        return SimpleNamespace(name=name, measure=lambda _: bits and {"value": bits, "unit": "bits"})

    ours = [sized("small", 3.148), sized("large", 3.86)]
    for bits, name in ((3.125, "small"), (3.13, "small"), (3.82, "small"), (3.85, "large"), (8.0, "large"), (None, "large"), (2.0, "small")):
        assert beside(ours, sized("tool", bits)).name == name
    assert beside([], sized("tool", 3.0)) is None


def test_times_of_two_machines_are_told_apart(tmp_path, make):
    book = build(tmp_path, make)
    assert "measured on" not in league_table(book)._repr_html_()
    file = tmp_path / "reference-2" / "cpu" / "best-int4" / "record.json"
    content = json.loads(file.read_text())
    content["provenance"]["cpu"] = "Old CPU"
    file.write_text(json.dumps(content))
    page = league_table(collect(tmp_path, tmp_path / "none"))._repr_html_()
    assert "; on Old CPU for best-int4." in page


def test_a_failure_stands_in_the_league_with_its_cause(tmp_path, make):
    build(tmp_path, make)
    folder = tmp_path / "reference-2" / "cpu" / "tool-gptqmodel-int4"
    plan = json.loads((folder / "record.json").read_text())["params"] | {"name": folder.name, "family": "tool"}
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / f"{folder.name}.yaml").write_text(json.dumps(plan))  # JSON is YAML
    (folder / "record.json").unlink()
    status = {"state": "failed", "cause": "gptqmodel 7.6.0 could not be installed: <no wheel>"}
    (folder / "status.json").write_text(json.dumps(status))
    book = collect(tmp_path, tmp_path / "none", tmp_path / "params")
    failed = next(one for one in standings(book)[4] if one.entry.name == folder.name)
    assert failed.place is None and "Without figures: tool-gptqmodel-int4." in league_words(book)
    page = tools_table(book)._repr_html_()
    assert "could not be installed: &lt;no wheel&gt;" in page and "0 of 1 settings" in page
    assert "gptqmodel-int4" in league_table(book)._repr_html_()


def test_needs_are_answered_by_what_fits_them(tmp_path, make):
    page = needs_table(build(tmp_path, make))._repr_html_()
    rows = {row.split("</th>")[0].rpartition(">")[2]: row for row in page.split("<tr>") if "</th>" in row}
    assert "tool-llama-cpp-q4_0" in rows["Least loss with 4 bits"] and "best-int4" in rows["Least loss with 4 bits"]
    assert "tool-llama-cpp-q4_0" in next(v for k, v in rows.items() if "without any text" in k)
    assert "tool-gptqmodel-int4" in next(v for k, v in rows.items() if "vLLM" in k)
    assert "tool-gptqmodel-int4" in rows["Fastest decode with 4 bits, one 72B layer"]
    assert not any("Fastest prefill" in k or "8 bits" in k for k in rows)  # nothing answers them


def test_facts_fairness_and_ideas(tmp_path, make):
    book = build(tmp_path, make)
    page = tools_table(book)._repr_html_()
    assert "7.6.0" in page and "released 2026-09-01" in page and "Apache-2.0" in page and "1 of 1 settings" in page
    page = fairness_table(book)._repr_html_()
    assert "reads no text" in page and "6.1000" in page and "other values" in page and "2 to 3 s" in page
    ideas = ideas_table()._repr_html_()
    assert all(f">{name}<" in ideas for name in tool_names())


def test_without_tools_there_is_no_league(tmp_path, make):
    make.strategy(tmp_path / "reference-2" / "cpu", "baseline", "baseline", [], 2.0, 9)
    book = collect(tmp_path, tmp_path / "none")
    assert [table(book) for table in (league_table, tools_table, fairness_table, needs_table)] == [None] * 4
    assert "make tools" in league_words(book) and league_frame(book).empty
    size_against_loss(league_frame(book)), time_against_loss(league_frame(book))


def test_figures_say_what_they_show(tmp_path, make):
    frame = league_frame(build(tmp_path, make))
    assert set(frame["tool"]) == {"ours", "gptqmodel", "llama-cpp"}
    assert "with 4 bits best-int4" in loss_alt(frame) and "tool-llama-cpp-q4_0 takes 2.5 s" in time_alt(frame)
    for figure in (size_against_loss(frame), time_against_loss(frame)):
        assert figure.axes
