"""Numbers are written with the digits their intervals support, and never claim more than the interval does."""

import pytest

from qlib.report import numbers
from qlib.report.measures import MEASURES, label

GAP = numbers.SPACE


def m(value, unit="percent", low=None, high=None, n=None):
    return {"value": value, "unit": unit, "low": low, "high": high, "n": n}


@pytest.mark.parametrize(
    "measurement, text",
    [
        (m(17.2134, "perplexity", 16.9, 17.5), "17.21 (16.90 to 17.50)"),
        (m(90.84, "percent", 89.9, 91.6), "90.8 % (89.9 to 91.6)"),
        (m(-0.3, "points", -0.64, 0.04), "−0.3 points (−0.6 to 0.0)"),
        (m(0.25, "points", 0.11, 0.39), "+0.25 points (+0.11 to +0.39)"),
        (m(144_575_840_256, "bytes"), "145 GB"),
        (m(3_021_000, "bytes"), "3.02 MB"),
        (m(999, "bytes"), "999 bytes"),
        (m(76_400, "ms"), "76.4 s"),
        (m(950.4, "ms", 920, 980), "950 ms (920 to 980)"),
        (m(0.83, "fraction"), "83.0 %"),
        (m(3.4, "ratio", 3.3, 3.5), "3.40× (3.30 to 3.50)"),
        (m(32768, "tokens"), "32,768 tokens"),
        (m(0, "nats"), "0.00 nats"),
        (m(float("nan")), "not measured"),
        (m("12"), "not measured"),
        (m(True), "not measured"),
        (None, "not measured"),
        ({}, "not measured"),
    ],
)
def test_write(measurement, text):
    assert numbers.write(measurement).replace(GAP, " ") == text


def test_one_field_keeps_the_digits_of_the_whole():
    found = m(17.2134, "perplexity", 16.9, 17.5, 700)
    assert numbers.write(found, "value") == "17.21"
    assert numbers.write(found, "low") == "16.90"
    assert numbers.write(found, "n") == "700"
    assert numbers.write(found, "interval").replace(GAP, " ") == "16.90 to 17.50"
    assert numbers.write(found, "method") == numbers.ABSENT
    assert numbers.write(found, n=True).replace(GAP, " ") == "17.21 (16.90 to 17.50, n = 700)"


@pytest.mark.parametrize(
    "low, high, same",
    [(0.97, 1.01, True), (1.0, 1.2, True), (1.01, 1.2, False), (0.8, 0.99, False), (None, None, False)],
)
def test_a_speedup_whose_interval_holds_one_is_none(low, high, same):
    assert (numbers.speedup(m(1.005, "ratio", low, high)) == numbers.SAME) is same


@pytest.mark.parametrize(
    "low, high, better, answer",
    [
        (-0.5, 0.1, "higher", "yes"),
        (-1.0, 0.1, "higher", "yes"),
        (-1.1, -0.9, "higher", numbers.OPEN),
        (-3.0, -1.1, "higher", "no"),
        (None, None, "higher", numbers.OPEN),
        (-3.0, -1.1, "lower", "yes"),
        (-0.5, 0.1, "lower", "no"),
    ],
)
def test_a_target_is_met_only_by_the_bad_end(low, high, better, answer):
    assert numbers.meets(m(-0.4, "points", low, high), -1.0, better) == answer


def test_the_gate_is_relative_to_the_baseline():
    change = m(-0.85, "points", -0.95, -0.75)
    assert numbers.keeps(change, m(96.0)) == "yes"
    assert numbers.keeps(change, m(90.0)) == numbers.OPEN
    assert numbers.keeps(change, m(70.0)) == "no"
    assert numbers.keeps(change, None) == numbers.ABSENT


def test_a_column_shares_unit_and_decimals():
    unit, cells = numbers.column([m(3e6, "bytes"), None, m(810_000, "bytes")])
    assert (unit, [text for text, _ in cells]) == ("MB", ["3.000", "not measured", "0.810"])
    unit, cells = numbers.column([m(90.8, "percent", 89.9, 91.7), m(8, "percent", 7.1, 8.9)])
    assert [text for text, _ in cells] == ["90.8", "8.0"]
    assert numbers.column([None]) == ("", [("not measured", "")])


def test_every_name_of_a_record_has_a_label():
    from qlib.record import UNITS

    assert set(UNITS) <= set(MEASURES)
    assert label("shape.latency.decode_ms") == "At true shape: Decode, per token"
    assert label("task.arc_easy") == "Accuracy on arc_easy"
