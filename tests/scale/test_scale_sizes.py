"""The power law of sizes, and what all layers take according to one."""

import numpy as np
import pytest

from qlib.evaluate.footprint import shape_footprint
from qlib.models.shapes import find_shape
from qlib.record import check_measurements
from qlib.scale import sizes as module
from qlib.scale.extrapolate import extrapolated, formats_left
from qlib.scale.sizes import slope, slopes, time_sizes

PARAMETERS = (5e8, 7e9, 7e10)


def test_an_exact_power_law_is_found_with_no_width_of_interval():
    found = slope(PARAMETERS, [np.full(4, 3e-7 * parameters**0.9) for parameters in PARAMETERS])
    assert found["value"] == found["low"] == found["high"] == pytest.approx(0.9) and found["n"] == 4
    assert found["farthest"] == pytest.approx(1)


def test_noise_widens_the_interval_and_a_size_off_the_line_is_told():
    random = np.random.default_rng(0)
    rounds = [parameters * np.exp(random.normal(0, 0.1, 30)) for parameters in PARAMETERS]
    found = slope(PARAMETERS, rounds)
    assert found["low"] < 1 < found["high"] < 1.2
    rounds[1] = 3 * rounds[1]
    assert 1.5 < slope(PARAMETERS, rounds)["farthest"] < 3
    x, y = np.log(PARAMETERS), np.log([np.median(one) for one in rounds])
    assert slope(PARAMETERS, rounds)["value"] == pytest.approx(np.cov(x, y)[0, 1] / np.var(x, ddof=1)), "least squares"


def test_one_size_alone_has_no_power():
    one = {"parameters": 1.0, "rounds": {"decode": {"bf16": [1.0]}}}
    assert slopes({"a": one}) == {}
    both = slopes({"a": one, "b": {"parameters": 4.0, "rounds": {"decode": {"bf16": [2.0]}}}})
    assert both["decode"]["bf16"]["value"] == pytest.approx(0.5)


def test_a_shape_that_was_timed_is_not_timed_again(monkeypatch):
    layer = {phase: {"milliseconds": {"bf16": [1.0, 2.0]}} for phase in ("decode", "prefill")}
    timed = {
        "formats": {"bf16": {"latency.decode_ms": {"value": 1}}}, "conditions": "here",
        "layer": layer | {"bandwidth": [1.0, 1.0], "packing_seconds": {}},
        "head": {"milliseconds": {"head": [10.0, 10.0]}, "bandwidth": [1.0, 1.0]},
    }  # fmt: skip
    asked = []
    monkeypatch.setattr(module, "time_formats", lambda model, *given, **more: asked.append(model) or timed)
    found = time_sizes(["qwen2.5-0.5b", "qwen2.5-1.5b"], ["bf16"], 8, 8, 2, timed={"qwen2.5-1.5b": timed})
    assert asked == ["qwen2.5-0.5b"] and found["qwen2.5-1.5b"]["parameters"] == find_shape("qwen2.5-1.5b").parameters
    assert found["qwen2.5-0.5b"]["rounds"]["decode"]["bf16"] == [24 * 1 + 10, 24 * 2 + 10], "layers x layer + head"


def test_all_layers_take_so_many_times_one_and_are_labelled_so():
    shape = find_shape("qwen-72b")
    one = {"seconds": 3.0, "peak_bytes": 5, "before_bytes": 2e9, "tokens": 64, "weights_kept": 0.5, "format": "bf16"}
    methods = {"wanda": one, "slow": {"reason": "too slow", "format": "int4-g128"}, "never": {"reason": "no"}}
    formats = {"bf16": {"latency.decode_ms": 1}, "int4-g128": {"latency.decode_ms": 2, "compress.seconds": 9}}
    assert formats_left(methods) == ["bf16", "int4-g128"]
    found = extrapolated("qwen-72b", methods, formats)
    assert found["slow"] == {"latency.decode_ms": 2} and "never" not in found
    seconds = found["wanda"].pop("latency.decode_ms") and found["wanda"]["compress.seconds"]
    assert (seconds["value"], seconds["n"], seconds["low"]) == (240, 1, None)
    assert "extrapolated to 80 layers" in seconds["method"] and "measured once" in seconds["conditions"]
    assert found["wanda"]["size.disk_bytes"] == shape_footprint(shape, "bf16", 0.5)["size.disk_bytes"]
    assert check_measurements(found["wanda"], None)["compress.calibration_tokens"]["value"] == 64
