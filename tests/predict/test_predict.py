"""The verb and the command: what is predicted, from what, and what is said where nothing is."""

import json
import math
from pathlib import Path

import pytest

from qlib import cli
from qlib.errors import UserError
from qlib.predict import predict
from qlib.predict.counts import Text
from qlib.predict.experience import learn, outcome_of
from qlib.predict.anatomy import read_anatomy
from qlib.predict.machine import KINDS, Machine, read_machine
from qlib.predict.memory import peak_terms
from qlib.predict.passes import compress_columns
from qlib.predict.tokens import decode_columns, prefill_columns
from qlib.models.shapes import Shape
from qlib.recipe import read_recipe
from qlib.report.published_qwen import PUBLISHED

ROOT = Path(__file__).parents[2]
GPTQ = [{"pass": "gptq", "bits": 4}]
TEXT = Text(32768, 256)


def machine(**changes):
    sizes = {"memory_bytes": 24 * 10**9, "process_bytes": 3 * 10**8}
    told = {"name": "test", "device": "cpu", "threads": 2, "measured": "never", "rates": {kind: {0: 1e9} for kind in KINDS}}
    return Machine(**told | sizes | changes)


def small(hidden, layers=2):
    return Shape(f"s{hidden}", layers, hidden, hidden // 64, hidden // 64, 2 * hidden, 512, tied=True, head_dim=64)


def run(hidden, recipe, **measured):
    from dataclasses import asdict

    told = {"tokens": 4096, "length": 256, "prompt": 256, "context": 256}
    return {"name": f"{len(recipe)} on {hidden}", "shape": asdict(small(hidden)), "recipe": recipe, "measured": measured} | told


def test_a_token_reads_every_byte_once():
    anatomy, here = read_anatomy("qwen-72b"), machine()
    for recipe, kernel, size in (([], "bf16", 139.6e9), (GPTQ, "Int4Linear", 37.1e9)):
        columns = decode_columns(outcome_of(anatomy, recipe), here, 256)
        assert columns[f"decode {kernel}: bytes"] * 1e9 == pytest.approx(size + (3.2e9 if kernel == "bf16" else 0), rel=0.01)
    prompt = prefill_columns(outcome_of(anatomy, []), here, 256)
    assert prompt["prefill bf16: products"] * 1e9 == pytest.approx(2 * 256 * 80 * anatomy.linear_weights)


def test_a_head_of_codes_is_read_as_codes_and_what_was_never_timed_has_no_time():
    anatomy, here = read_anatomy("qwen-72b"), machine()
    plain, ends = (decode_columns(outcome_of(anatomy, GPTQ + more), here, 256) for more in ([], [{"pass": "ends"}]))
    read = (plain["decode bf16: bytes"] - ends["decode bf16: bytes"]) * 1e9
    assert read == pytest.approx(2 * 152064 * 8192)
    assert ends["decode Int8Linear: bytes"] * 1e9 == pytest.approx(152064 * (8192 + 2))
    figures = predict("qwen-72b", [{"pass": "kv_cache"}], here, root=ROOT).figures
    assert "cache of codes is not timed" in figures["decode_seconds"].why


def test_gptq_counts_its_hessians_factors_and_what_is_handed_on():
    anatomy = read_anatomy(small(256, layers=3))
    columns = compress_columns(anatomy, read_recipe(GPTQ), TEXT, machine())
    widths, linears = [256, 256, 256, 512], anatomy.linears.values()
    assert columns["Hessian"] * 1e9 == pytest.approx(3 * 32768 * sum(width**2 for width in widths))
    assert columns["factor"] * 1e9 == pytest.approx(3 * sum(width**3 / 3 for width in widths))
    assert columns["gptq: handed on"] * 1e9 == pytest.approx(3 * sum(rows * width**2 for rows, width in linears))
    assert columns["walk bf16: products"] * 1e9 == pytest.approx(3 * 2 * 32768 * anatomy.linear_weights)
    assert columns["walk int4: products"] * 1e9 == pytest.approx(2 * 2 * 32768 * anatomy.linear_weights)
    again = compress_columns(anatomy, read_recipe([GPTQ[0] | {"true_sequential": True}]), TEXT, machine())
    assert again["walk bf16: products"] == pytest.approx(4 * columns["walk bf16: products"])


def test_memory_of_a_stream_does_not_grow_with_depth_and_that_of_a_model_by_its_blocks():
    shallow, deep = (read_anatomy(small(512, layers)) for layers in (2, 12))
    steps = read_recipe(GPTQ)
    for streamed, more in ((True, 0), (False, 10 * 2 * sum(math.prod(shape) for shape in deep.block.values()))):
        two, twelve = (sum(peak_terms(one, steps, TEXT, 0, streamed).values()) for one in (shallow, deep))
        assert twelve - two == more


def test_hessians_of_a_block_are_all_there_while_it_is_fed_and_one_twice_while_it_is_factorized():
    steps, few = read_recipe(GPTQ), Text(64, 64)
    anatomy = read_anatomy("qwen-72b")
    terms = peak_terms(anatomy, steps, few, 0, streamed=True)
    assert terms["Hessians"] + terms["Hessian being factorized"] == 4 * 2 * 24576**2  # down_proj, the last one


def test_times_of_a_shape_come_from_runs_of_others_and_carry_their_band():
    here = machine()
    truth = {"decode bf16: bytes": 1.5, "decode bf16: calls": 3e4}
    runs = []
    for hidden in (256, 512, 1024):
        columns = decode_columns(outcome_of(read_anatomy(small(hidden)), []), here, 256)
        runs.append(run(hidden, [], decode_seconds=sum(truth[name] * count for name, count in columns.items())))
    learnt = learn(here, runs)
    assert learnt.fits["tokens"].factors == pytest.approx(truth, rel=1e-3) and learnt.hidden == (256, 1024)
    assert [name for name, _, _ in learnt.pairs["decode_seconds"]] == ["0 on 256", "0 on 512", "0 on 1024"]
    assert learnt.band("decode_seconds") == pytest.approx(0, abs=1e-3)
    found = predict("qwen-72b", [{"pass": "rtn"}], machine(runs=runs), root=ROOT)
    assert found.figures["decode_seconds"].value is None and "decode Int4Linear" in found.figures["decode_seconds"].why
    assert "which this model lies outside of" in found.learnt
    bf16 = predict("qwen-72b", [{"pass": "magnitude"}], machine(runs=runs), root=ROOT).figures["decode_seconds"]
    assert bf16.low <= bf16.value <= bf16.high and bf16.value == pytest.approx(1.5 * 144.5, rel=0.2)


def test_without_runs_a_token_has_a_floor_and_compressing_no_time(tmp_path):
    (tmp_path / "params").mkdir()
    found = predict("qwen-72b", GPTQ, machine(), root=tmp_path)
    token = found.figures["decode_seconds"]
    assert token.value is None and token.low == pytest.approx(40.3, rel=0.03) and token.method == "at full rate"
    assert found.figures["compress_seconds"].value is None and "no measured run" in found.figures["compress_seconds"].why
    assert found.fits["compress in memory"] is False and found.fits["compress as a stream"] is True
    assert found.fits["on disk"] is None


@pytest.mark.parametrize("strategy", sorted((ROOT / "params").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_strategy_is_predicted_or_says_why_not(strategy):
    from qlib.params import load_strategy

    read = load_strategy(strategy, ROOT)
    if not read.recipe or any(step["pass"] == "tool" for step in read.recipe):
        return
    figures = predict("reference-2", read, machine(), root=ROOT).figures
    assert all(one.value is not None or one.why for one in figures.values())


def test_recipes_that_cannot_work_are_refused_as_everywhere():
    with pytest.raises(UserError, match="pass 'rtm' is unknown .did you mean 'rtn'"):
        predict("qwen-72b", [{"pass": "rtm"}], machine(), root=ROOT)
    with pytest.raises(UserError, match="group_size: 64 does not divide the 96 input channels of self_attn.q_proj"):
        predict(small(96), [{"pass": "rtn", "group_size": 64}], machine(), root=ROOT)


def test_published_figures_lie_above_the_floor_of_their_hardware():
    a100 = read_machine("a100-80g")
    recipes = {
        "BF16": [{"pass": "magnitude"}], "GPTQ Int8": [{"pass": "rtn", "bits": 8, "group_size": 128}], "GPTQ Int4": GPTQ,
    }  # fmt: skip
    rows = [one for one in PUBLISHED if one.shape == "qwen-72b"]
    assert len(rows) == 3
    for row in rows:
        found = predict("qwen-72b", recipes[row.precision], a100, root=ROOT, context=1024).figures
        assert found["decode_seconds"].low < 1 / row.tokens
        held = found["resident_bytes"].value + 2048 * 2 * 2 * 80 * 8192
        assert 0.85 < held / (row.gigabytes * 2**30) < 1  # printed as GB


def test_the_command_prints_units_bands_and_what_is_missing(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    told = ["predict", "--model", "qwen-72b", "--recipe", "gptq-int4", "--machine", "a100-80g"]
    assert cli.main(told) == 0
    text = capsys.readouterr().out
    assert "on disk" in text and "41,249 MB  exact" in text and "at least" in text
    assert "not predicted:" in text and "compressing in memory: the machine's rate of" in text
    assert cli.main([*told, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["figures"]["kv_bytes_per_token"]["value"] == 2621440


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"--model": "qwen-27b"}, "model: 'qwen-27b' is unknown (did you mean 'qwen-72b'?)"),
        ({"--recipe": "gptq-int44"}, "gptq-int44: no such strategy file (did you mean 'gptq-int4'?)"),
        ({"--machine": "h100.json"}, "--machine: 'h100.json' is no file"),
        ({"--context": "0"}, "--context: 0 is not allowed; allowed: a whole number of at least 1"),
    ],
)
def test_the_command_refuses_in_one_line(capsys, monkeypatch, changes, words):
    monkeypatch.chdir(ROOT)
    told = {"--model": "qwen-72b", "--recipe": "gptq-int4", "--machine": "a100-80g"} | changes
    assert cli.main(["predict", *(word for pair in told.items() for word in pair)]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_an_unknown_device_is_refused_before_anything_is_measured(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert cli.main(["predict", "--model", "qwen-72b", "--recipe", "gptq-int4", "--device", "tpu"]) == 2
    assert "--device: 'tpu' is unknown; allowed: cpu, cuda" in capsys.readouterr().err
