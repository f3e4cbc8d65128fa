"""Timing: structure, pairing and honesty of the figures; the figures themselves depend on the machine."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from qlib.errors import UserError
from qlib.evaluate import fastest, latency, parts, roofline, timing
from qlib.evaluate.fastest import FORMS, PlainLinear
from qlib.evaluate.footprint import shape_footprint
from qlib.evaluate.whole_model import model_figures, rounds_of
from qlib.models.shapes import Shape
from qlib.record import check_measurements

CPU = torch.device("cpu")
TINY = Shape("tiny", 3, 128, 4, 2, 256, 96, head_dim=64)
FORMATS = ["bf16", "int8", "int4-g128", "int3-g64", "bf16@0.5"]


@pytest.fixture(scope="module")
def small_machine():
    """Pretend a small cache and a tiny model."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (fastest, latency, roofline):
            patch.setattr(module, "last_level_cache", lambda device=CPU: 2**18)
        patch.setattr(latency, "find_shape", lambda name: TINY)
        yield patch


@pytest.fixture(scope="module")
def timed(small_machine, tmp_path_factory):
    small_machine.setattr(timing, "LOCK", tmp_path_factory.mktemp("timing") / "lock")
    state = torch.get_rng_state()
    result = latency.time_formats("tiny", FORMATS[1:], prompt_tokens=96, context_tokens=16, new_tokens=4, rounds=6)
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    return result


def test_every_format_has_every_measurement(timed):
    assert list(timed["formats"]) == FORMATS
    for format, measurements in timed["formats"].items():
        assert check_measurements(measurements, None) == measurements
        names = {f"latency.{name}" for name in ("prefill_ms", "decode_ms", "request_ms", "roofline_fraction")}
        names |= {f"latency.{name}_speedup" for name in ("prefill", "decode", "request")}
        assert names | {"size.disk_bytes", "size.resident_bytes"} <= set(measurements)
        assert ("compress.seconds" in measurements) is (not format.startswith("bf16"))


def test_intervals_hold_their_value_and_units_are_positive(timed):
    for measurements in timed["formats"].values():
        for name, one in measurements.items():
            assert one["value"] > 0
            if name.startswith("latency"):
                assert one["low"] <= one["value"] <= one["high"] and one["n"] == 6
                assert "threads" in one["conditions"] and "context 16" in one["conditions"]


def test_sizes_do_not_depend_on_the_run(timed):
    for format, measurements in timed["formats"].items():
        for name, one in shape_footprint(TINY, format).items():
            assert measurements[name] == one


def test_the_model_is_layers_times_layer_plus_head_and_ratios_are_paired(timed):
    rounds, head = timed["layer"]["decode"]["milliseconds"], np.array(timed["head"]["milliseconds"]["head"])
    base, int4 = (TINY.layers * np.array(rounds[format]) + head for format in ("bf16", "int4-g128"))
    figures = timed["formats"]["int4-g128"]
    assert figures["latency.decode_ms"]["value"] == pytest.approx(np.median(int4), rel=1e-3)
    assert figures["latency.decode_speedup"]["value"] == pytest.approx(np.median(base / int4), rel=1e-3)
    own = timed["formats"]["bf16"]["latency.decode_speedup"]
    assert own["value"] == own["low"] == own["high"] == 1


def test_a_mix_is_summed_up_linear_by_linear(timed):
    rounds = rounds_of(timed)
    uniform = {name: {"int8": 1.0} for name in TINY.linears}
    mixed = uniform | {"mlp.down_proj": {"int4-g128": 1 / 3, "int8": 2 / 3}, "mlp.up_proj": {"int4-g128": 1.0}}
    for phase in ("decode", "prefill"):
        times = timed["layer"][phase]["milliseconds"]
        timed_linears = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj")  # one of each size
        expected = {f"{format} {name}" for format in FORMATS[:4] for name in timed_linears}
        assert set(times) - {"read bandwidth", *FORMATS} == expected
        assert np.array_equal(rounds.model(TINY, phase, uniform), rounds.model(TINY, phase, "int8"))
        like = {"mlp.down_proj": "self_attn.o_proj", "mlp.up_proj": "self_attn.q_proj"}  # of the same size
        gain = {name: np.subtract(times[f"int4-g128 {one}"], times[f"int8 {one}"]) for name, one in like.items()}
        layer = times["int8"] + gain["mlp.down_proj"] / 3 + gain["mlp.up_proj"]
        expected = TINY.layers * layer + timed["head"]["milliseconds"]["head"]
        assert rounds.model(TINY, phase, mixed) == pytest.approx(expected, rel=1e-3)
    figures = model_figures(TINY, rounds, mixed, 16, 4, "")
    assert shape_footprint(TINY, mixed)["size.disk_bytes"] == figures["size.disk_bytes"] and "compress.seconds" not in figures
    short = model_figures(replace(TINY, layers=1), rounds, "int8", 16, 4, "", whole=TINY)  # of a model with fewer layers
    whole, head = rounds.model(TINY, "decode", "bf16"), np.array(timed["head"]["milliseconds"]["head"])
    left = np.array(timed["layer"]["decode"]["milliseconds"]["int8"]) + head
    assert short["latency.decode_ms"]["value"] == pytest.approx(np.median(left), rel=1e-3)
    assert short["latency.decode_speedup"]["value"] == pytest.approx(np.median(whole / left), rel=1e-3)
    with pytest.raises(KeyError):
        rounds.model(TINY, "decode", {name: {"int2-g32": 0.5, "int8": 0.5} for name in TINY.linears})


def test_the_baseline_is_the_fastest_form_and_is_shown(timed):
    for phase in ("decode", "prefill"):
        compared = timed["baseline"][phase]
        assert compared["chosen"] == min(compared["milliseconds"], key=compared["milliseconds"].get)
        assert set(timed["layer"][phase]["kernels"]["bf16"].values()) == {compared["chosen"]}


def test_kernels_are_named_by_linear(timed):
    decode, prefill = (timed["layer"][phase]["kernels"] for phase in ("decode", "prefill"))
    assert set(decode["int4-g128"]) == set(TINY.linears)
    assert "packed int4" in decode["int4-g128"]["mlp.up_proj"]
    assert "matmul" in prefill["int4-g128"]["mlp.up_proj"]
    assert "packed int4" in decode["int3-g64"]["mlp.up_proj"]


def test_the_roofline_stands_beside_the_time(timed):
    assert timed["bandwidth"]["value"] > 0 and timed["bandwidth"]["unit"] == "GB/s"
    floors = [timed["floor"][format]["decode_ms"] for format in ("bf16", "int8", "int3-g64", "int4-g128")]
    assert floors == sorted(floors, reverse=True)
    assert "against a bf16 kernel" in timed["formats"]["int8"]["latency.decode_speedup"]["conditions"]


def test_a_round_goes_past_the_cache():
    assert roofline.copies_needed([100, 60], 10) == 2  # 80 are to be touched; the smaller one alone does not reach it
    assert roofline.copies_needed([100, 90], 10) == 1
    assert roofline.copies_needed([3, 2, 1], 300) == 400
    sizes = [parts.layer_bytes(TINY, format, 17) for format in FORMATS]
    assert roofline.copies_needed(sizes, 2**20) * sum(sizes) >= 8 * 2**20
    assert roofline.last_level_cache(CPU) >= 2**18


def test_rounds_run_every_copy_once_in_alternating_order():
    log = []
    calls = {name: [lambda name=name, copy=copy: log.append((name, copy)) for copy in (0, 1)] for name in "AB"}
    done = timing.time_rounds(calls, rounds=2, device=CPU, batches=1)
    assert done.warm_up == 3 and not done.settled and {len(values) for values in done.rounds.values()} == {2}
    counted = log[3 * 4 :]
    assert counted == [("B", 0), ("A", 0), ("A", 1), ("B", 1), ("A", 0), ("B", 0), ("B", 1), ("A", 1)]


def test_warming_up_ends_when_medians_rest(monkeypatch):
    times = iter([8.0] * 3 + [4.0] * 3 + [2.0] * 3 + [2.0] * 100)
    monkeypatch.setattr(timing, "_clock", lambda call, device: next(times))
    done = timing.time_rounds({"A": [None]}, rounds=5, device=CPU, batches=9)
    assert done.warm_up == 12 and done.settled and (done.rounds["A"] == 2000).all()


def test_warming_up_with_long_calls_is_short(monkeypatch):
    times = iter([8.0] * 3 + [4.0] * 3 + [2.0] * 3 + [1.0] * 100)
    monkeypatch.setattr(timing, "_clock", lambda call, device: next(times))
    monkeypatch.setattr(timing, "WARM_SECONDS", 0.0)
    done = timing.time_rounds({"A": [None]}, rounds=5, device=CPU, batches=9)
    assert done.warm_up == 6 and not done.settled


def test_a_long_round_is_a_batch_of_its_own(monkeypatch):
    times = iter([4.0, 2.0] + [2.0] * 100)
    monkeypatch.setattr(timing, "_clock", lambda call, device: next(times))
    monkeypatch.setattr(timing, "LONG_ROUND", 0.0)
    done = timing.time_rounds({"A": [None]}, rounds=5, device=CPU, batches=9)
    assert done.warm_up == 3 and done.settled and (done.rounds["A"] == 2000).all()


def test_the_interval_is_a_bootstrap_of_the_median():
    values = np.concatenate([np.full(50, 10.0), np.linspace(9, 11, 51)])
    value, low, high = timing.median_interval(values)
    assert value == 10 and 9.5 < low <= 10 <= high < 10.5
    assert timing.median_interval(values) == (value, low, high)


def test_two_timings_never_overlap(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "LOCK", tmp_path / "lock")
    log = []

    def second():
        with timing.exclusive():
            log.append("second")

    with timing.exclusive():
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.2)
        log.append("first")
    thread.join()
    assert log == ["first", "second"]


def test_the_decoded_token_sees_the_context(monkeypatch):
    layer, _ = parts.build_layer(TINY, "bf16", PlainLinear, CPU, torch.Generator().manual_seed(0))
    work = parts.Workload(TINY, 1, 16, CPU, torch.Generator().manual_seed(1))
    with torch.inference_mode():
        before = work.run(layer)
        work.values[:, :, 3] += 1
        assert work.keys.shape[2] == 17 and not torch.equal(work.run(layer), before)


def test_all_forms_of_the_baseline_compute_the_same(small_machine):
    weight, bias, x = torch.randn(64, 128).bfloat16(), torch.randn(64).bfloat16(), torch.randn(5, 128).bfloat16()
    outs = []
    for form in FORMS:
        try:
            outs.append(form(weight, bias)(x))
        except (RuntimeError, NotImplementedError):
            continue
    assert len(outs) >= 2
    for out in outs[1:]:
        assert torch.allclose(out.float(), outs[0].float(), rtol=2**-6, atol=2**-5)
    form, milliseconds = fastest.fastest_form(weight, rows=1)
    assert form.name in milliseconds


def test_bad_input_is_refused(small_machine):
    with pytest.raises(UserError, match="format 'int9' is unknown"):
        latency.time_formats("tiny", ["int9"])
    with pytest.raises(UserError, match="group_size 48 does not divide"):
        latency.time_formats("tiny", ["int4-g48"])
    with pytest.raises(UserError, match="rounds: 0 is not allowed"):
        latency.time_formats("tiny", ["int8"], rounds=0)
