"""The book holds every run in order, says whose figures are whose, and never mixes what must stay apart."""

import re

import pytest

from qlib.errors import UserError
from qlib.report import words
from qlib.report.article import CLAIMS, article_table, article_text, chosen
from qlib.report.book import collect


def test_order_and_states(book):
    assert [(e.name, e.state) for e in book.strategies] == [
        ("baseline", "done"),
        ("heads-third", "done"),
        ("wanda-50", "published"),
        ("rtn-int8", "done"),
        ("rtn-int4", "done"),
        ("rtn-int3", "done"),
        ("rtn-int2", "done"),
        ("gptq-int4", "failed"),
        ("evil", "done"),
        ("hand", "unverified"),
    ]
    assert [e.name for e in book.failures] == ["gptq-int4"]
    assert book.get("gptq-int4").family == "weight_quantization"  # from its strategy file: it left no record
    assert book.models == ["reference-2"]


def test_a_published_record_never_replaces_a_run(book):
    assert book.get("rtn-int4").measure("quality.accuracy")["value"] == 90.5
    assert book.get("wanda-50").label == "published record"


def test_speed_records_stand_apart_and_devices_side_by_side(book):
    assert list(book.speed) == ["qwen-72b", "reference-2"]
    assert list(book.speed["qwen-72b"]) == ["cpu", "nvidia-h200"]
    int4 = book.get("rtn-int4")
    assert book.shape(int4)["latency.decode_ms"]["value"] == 950
    assert book.shape(int4, device="nvidia-h200")["latency.decode_ms"]["value"] == 9.5
    assert book.shape(book.get("heads-third")) == {}  # parts were removed: no format's time is its own


def test_gate(book):
    gates = {e.name: book.gate(e) for e in book.strategies}
    assert gates["rtn-int8"] == gates["rtn-int4"] == "yes"
    assert gates["rtn-int3"] == "not resolved"
    assert gates["rtn-int2"] == "no"
    assert gates["gptq-int4"] == "not measured"


def test_quick_checks_are_rows_only_where_there_is_nothing_else(project, make):
    folder = project / "reports" / "runs"
    quick = make.record("smoke-x", "pruning", make.quality(50, -40, 90, 1, 4), tier="smoke")
    make.write(folder / "reference-2" / "cpu" / "smoke-x", quick)
    make.write(folder / "other" / "cpu" / "smoke-x", quick)
    book = _collect(project)
    assert [e.model for e in book.strategies if e.name == "smoke-x"] == ["other"]
    assert sum(e.name == "smoke-x" for e in book.entries) == 2


def test_unknown_and_unrun_names(book):
    assert book.get("never-run") is None
    with pytest.raises(UserError, match="did you mean 'rtn-int4'"):
        book.get("rtn-int44")


def test_a_failed_rerun_keeps_the_older_figures_and_says_so(project, make):
    folder = project / "reports" / "runs" / "reference-2" / "cpu" / "rtn-int8"
    make.write(folder, {}, state="timeout", cause="took too long")
    entry = _collect(project).get("rtn-int8")
    assert entry.failed and entry.measurements
    assert entry.label == "timeout, figures of an earlier run"


def test_a_runner_that_was_killed_left_a_crash(project, make):
    cpu = project / "reports" / "runs" / "reference-2" / "cpu"
    folder = make.write(cpu / "killed", {}, state="running", started="x")
    assert _collect(project).get("killed").state == "crashed"
    make.write(folder, make.record("killed", "pruning", {}, provenance={"started": "x"}), state="")
    assert _collect(project).get("killed").state == "done"


def test_a_broken_record_is_a_failure_not_an_exception(project):
    (project / "reports" / "runs" / "reference-2" / "cpu" / "rtn-int8" / "record.json").write_text('{"name": ')
    entry = _collect(project).get("rtn-int8")
    assert entry.state == "failed" and "record.json cannot be read" in entry.status["cause"]


def test_the_articles_rows_choose_by_rule(book):
    found = {claim.family: chosen(book, claim) for claim in CLAIMS}
    assert found["weight_quantization"].name == "rtn-int4"  # int8 loses less, but the row is about four bits
    assert found["pruning"].name == "heads-third"  # wanda-50 does not become as small as claimed
    assert found["mixed_precision"].name == "evil"


def test_a_row_without_a_claim_shows_what_is_really_smaller(trained, tmp_path, make):
    found = {claim.title: chosen(trained, claim) for claim in CLAIMS}
    assert found["Pruning, then recovery"].name == "narrow-tuned" and found["Combined"].name == "all"
    assert found["Post-quantization fine-tuning"].name == "rounded-tuned"
    assert found["Pruning"].name == "narrow" and found["Mixed precision"] is None
    page = article_table(trained)._repr_html_()
    assert page.count("not claimed") == 9 and "control" in page and "<td></td>" not in page
    folder = tmp_path / "reference-2" / "cpu"
    make.strategy(folder, "zeros", "pruning", [{"pass": "magnitude"}], 2.1, 9, 3.0)
    make.strategy(folder, "narrow", "pruning", trained.get("narrow").params["recipe"], 3.0, 5, 2.9)
    book = collect(tmp_path, tmp_path / "none")
    assert chosen(book, CLAIMS[1]) is None  # zeros in a dense matrix do not count, nor does a saving below 5 %
    assert "none becomes smaller" in article_table(book)._repr_html_()
    assert "size and accuracy do not hold for pruning" in words.article_verdict(book)


def test_the_smallest_is_no_dense_matrix_of_zeros_and_no_control(tmp_path, make):
    folder = tmp_path / "reference-2" / "cpu"
    make.strategy(folder, "baseline", "baseline", [], 2.0, 9)
    make.strategy(folder, "zeros", "pruning", [{"pass": "magnitude"}], 2.0, 9)
    make.strategy(folder, "control", "finetuning", [{"pass": "finetune"}], 1.9, 10)
    make.strategy(folder, "small", "weight_quantization", [{"pass": "rtn"}], 2.2, 7, 1.0)
    said = words.finding(collect(tmp_path, tmp_path / "none"))
    assert said.startswith("Of 2 compressed strategies") and "every one that becomes smaller loses more than 1 %" in said
    make.strategy(folder, "trained", "finetuning", [{"pass": "rtn"}, {"pass": "finetune"}], 1.9, 9, 1.1)
    said = words.finding(collect(tmp_path, tmp_path / "none"))
    assert "trained is the smallest that keeps at least 99 %" in said and "after the same training reaches 100" in said


def test_the_first_sentence_follows_the_numbers(project, make):
    assert "rtn-int4 is the smallest that keeps at least 99 %" in words.finding(_collect(project))
    cpu = project / "reports" / "runs" / "reference-2" / "cpu"
    for name, delta in (("rtn-int8", -1.0), ("rtn-int4", -5.0)):
        measured = make.quality(90.8 + delta, delta, 17, 1.5, 4)
        make.write(cpu / name, make.record(name, "weight_quantization", measured))
    assert "none is shown to keep 99 %" in words.finding(_collect(project))
    for entry in _collect(project).strategies:
        if entry.family != "baseline" and entry.measurements:
            measured = make.quality(80.0, -10.0, 30, 1.5, 4)
            file = "result.json" if entry.state == "unverified" else "record.json"
            (cpu / entry.name).mkdir(exist_ok=True)
            make.write(cpu / entry.name, make.record(entry.name, entry.family, measured), file, state="")
    assert "every one loses more than 1 %" in words.finding(_collect(project))


def test_the_articles_claims_are_judged_by_what_was_measured(project, make):
    speed = project / "reports" / "runs" / "qwen-72b" / "cpu" / "speed-qwen-72b"
    cpu = project / "reports" / "runs" / "reference-2" / "cpu"

    def verdict(delta, speedup):
        for bits, name in ((4, "rtn-int4"), (3, "gptq-int4")):
            found = make.record(name, "weight_quantization", make.quality(90 + delta, delta, 17, 1.5, bits))
            make.write(cpu / name, found | {"shape_format": "int4-g128"})
        record = make.speed("qwen-72b", "cpu")
        record["formats"]["int4-g128"]["latency.request_speedup"] = make.number(speedup, "ratio", 0.1)
        make.write(speed, record)
        return words.article_verdict(_collect(project))

    fast = verdict(-0.2, 2.5)
    assert "size and accuracy hold for weight quantization" in fast and "of Qwen-72B, hold for weight quantization" in fast
    assert "of Qwen-72B, do not hold for weight quantization" in verdict(-0.2, 1.4)
    assert re.search("size and accuracy do not hold for [a-z, ]*weight quantization", verdict(-9.0, 2.5))


def test_an_empty_book_still_speaks(tmp_path):
    empty = collect(tmp_path / "runs", tmp_path / "published")
    assert words.finding(empty) == "No compressed strategy has been measured yet."
    assert words.failure_words(empty) == "Nothing has been run yet."
    assert "not resolved" in words.article_verdict(empty)


def _collect(project):
    return collect(project / "reports" / "runs", project / "reports" / "published", project / "params")


def test_the_article_for_a_terminal_has_no_empty_cell(book):
    lines, table = article_text(book).splitlines(), article_table(book)
    assert len(lines) == 1 + len(table.rows) and "72B: Size on disk" in lines[0] and "claimed: Accuracy" in lines[0]
    for line, row in zip(lines[1:], table.rows):
        assert all(cell.text and cell.text in line for cell in row)
