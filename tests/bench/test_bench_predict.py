"""The benchmark of predictions: what it measures, what it leaves behind, and how errors become rows."""

import json
from contextlib import nullcontext
from dataclasses import asdict

import pytest

from qlib.bench import bench_predict
from qlib.bench.bench_predict import FORMATS, JOBS, SHAPES, as_run, judge_figures, lower_of, measure, time_tokens
from qlib.bench.predict_runs import Job, apart
from qlib.evaluate.fastest import PlainLinear
from qlib.models.shapes import Shape
from qlib.predict.experience import RUNS, Experience, learn, outcome_of
from qlib.predict.anatomy import read_anatomy
from qlib.predict.passes import PASSES
from qlib.predict.machine import KINDS, Machine, read_machine
from qlib.predict.memory import WORK
from qlib.predict.sizes import disk_bytes, model_bytes

TINY = Shape("tiny", 2, 128, 2, 2, 256, 512, tied=True, head_dim=64)
HERE = Machine("test", "cpu", 1, 10**10, 10**8, {kind: {0: 1e9} for kind in KINDS}, "today")


def test_enough_pairs_of_shapes_and_recipes_that_can_all_be_counted():
    assert len(JOBS) >= 40 and len(SHAPES) == 5
    passes = {step["pass"] for job in JOBS.values() for step in job.recipe}
    assert passes <= set(PASSES) & {*WORK, "signround"}  # whose memory is not counted
    for recipe in FORMATS.values():
        outcome_of(read_anatomy(TINY), recipe)


def test_tokens_of_every_format_are_timed_in_both_phases(monkeypatch):
    monkeypatch.setattr(bench_predict, "last_level_cache", lambda device: 2**16)  # few copies: no time is looked at
    monkeypatch.setattr(bench_predict, "fastest_form", lambda sample, rows: (PlainLinear, {}))
    found = time_tokens(TINY, ("bf16", "int4-g128"), rounds=1)
    assert set(found) == {"bf16", "int4-g128"}
    assert all(set(one) == {"decode_seconds", "prefill_seconds"} and min(one.values()) > 0 for one in found.values())


def test_of_several_passes_the_least_time_of_each_figure_counts():
    first, second = ({TINY: {"bf16": {"decode_seconds": a, "prefill_seconds": b}}} for a, b in ((1.0, 4.0), (2.0, 3.0)))
    assert lower_of([first, second]) == {TINY: {"bf16": {"decode_seconds": 1.0, "prefill_seconds": 3.0}}}


@pytest.mark.parametrize("streamed", [False, True])
def test_a_job_in_a_process_of_its_own_brings_its_figures_back(streamed):
    job = Job(TINY, [{"pass": "rtn", "bits": 4, "group_size": 64}], 512, streamed=streamed)
    found = apart(job).measured
    if streamed:
        assert found["stream_seconds"] > 0 and found["stream_peak"] > 10**8
        return
    assert found["compress_seconds"] > 0 and found["compress_peak"] > 10**8
    outcome = outcome_of(read_anatomy(TINY), job.recipe)
    assert (found["disk"], found["resident"]) == (disk_bytes(outcome), model_bytes(outcome))


def test_errors_of_what_was_held_out_become_three_rows_for_each_figure():
    pairs = [(f"run {number}", 10.0, 10.0 + number / 2) for number in range(5)]
    rows = {row.name: row for row in judge_figures(Experience(pairs={"decode_seconds": pairs}), [], HERE)}
    assert len(rows) == 18
    median, worst = (rows[f"predict: {which} relative error of decode time"] for which in ("median", "worst"))
    assert median.measured == pytest.approx(0.1) and median.met is True
    assert worst.measured == pytest.approx(0.2) and worst.met is False and "the worst: run 4" in worst.how
    assert rows["predict: worst relative error of peak memory"].measured is None
    count = rows["predict: pairs within 15% of decode time"]
    assert count.measured == 4 and count.target == ">= 10" and count.met is False
    assert rows["predict: pairs within 15% of bytes on disk"].measured is None


def test_runs_are_left_where_predictions_look_for_them(monkeypatch, tmp_path):
    (tmp_path / "reports").mkdir()
    outcome = outcome_of(read_anatomy(TINY), [])
    jobs = [as_run("a", TINY, [], {"disk": disk_bytes(outcome)})]
    monkeypatch.setattr(bench_predict, "exclusive", nullcontext)
    monkeypatch.setattr(bench_predict, "SHAPES", {TINY: 0})
    monkeypatch.setattr(bench_predict, "this_machine", lambda fresh: HERE)
    monkeypatch.setattr(bench_predict, "time_tokens", lambda shape: {"bf16": {"decode_seconds": 0.1, "prefill_seconds": 0.2}})
    monkeypatch.setattr(bench_predict, "run_jobs", lambda jobs_: jobs)
    assert len(measure(tmp_path)) == 18
    taught = read_machine(str(tmp_path / RUNS))
    assert taught.rates == HERE.rates and [run["name"] for run in taught.runs] == ["bf16 on tiny", "a"]
    assert learn(taught, taught.runs).fits["tokens"].factors
    assert json.loads((tmp_path / RUNS).read_text())["runs"][1]["shape"] == asdict(TINY)
