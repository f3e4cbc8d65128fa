"""Factors of counts: found exactly where they are exact, never below 0, and judged on what was not seen."""

import math

import numpy as np
import pytest

from qlib.predict.fit import Run, fit_runs, held_out, spread

TRUE = {"bytes": 1.3, "calls": 4.0, "products": 2.0}


def runs(noise=0.0):
    random = np.random.default_rng(0)
    found = []
    for group in range(4):
        for number in range(3):
            counts = dict(zip(TRUE, random.uniform(0.01, 2.0, 3) * 10.0**group))
            seconds = sum(TRUE[name] * count for name, count in counts.items())
            seconds *= math.exp(noise * random.standard_normal())
            found.append(Run(f"{group}-{number}", f"shape {group}", counts, seconds))
    return found


def test_exact_factors_are_found_over_sizes_that_differ_a_thousandfold():
    assert fit_runs(runs()).factors == pytest.approx(TRUE, rel=1e-4)


def test_factors_are_those_of_a_general_solver_for_nonnegative_least_squares():
    from scipy.optimize import nnls

    more = [run.columns | {"never": 0.3 * run.columns["calls"] + 1e-3} for run in runs(0.3)]
    made = [Run(run.name, run.group, columns, run.seconds) for run, columns in zip(runs(0.3), more)]
    names = sorted(made[0].columns)
    shares = np.array([[run.columns[name] / run.seconds for name in names] for run in made])
    expected = dict(zip(names, nnls(shares, np.ones(len(made)))[0]))
    assert fit_runs(made).factors == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert min(expected.values()) == 0  # the bound matters here


def test_what_was_in_no_run_is_not_predicted():
    fit = fit_runs(runs())
    assert fit.seconds({"bytes": 1.0, "sorting": 1.0}) is None and fit.unknown({"bytes": 1.0, "sorting": 1.0}) == ["sorting"]
    assert fit.seconds({"bytes": 1.0, "sorting": 0.0}) == pytest.approx(1.3, rel=1e-4)


def test_a_shape_is_predicted_from_the_others_alone():
    made = runs()
    odd = [Run(run.name, run.group, run.columns, run.seconds * 10) if run.group == "shape 2" else run for run in made]
    predicted = {run.name: seconds for run, seconds in held_out(odd)}
    for run in made:  # what it took itself plays no part in its own prediction
        if run.group == "shape 2":
            assert predicted[run.name] == pytest.approx(run.seconds, rel=1e-3)
    assert len(predicted) == len(made)


def test_the_band_holds_nine_of_ten_runs_that_were_held_out():
    pairs = [(1.0, math.exp(off / 100)) for off in range(-50, 51)]
    band = spread(pairs)
    assert sum(abs(math.log(p / m)) <= band for m, p in pairs) / len(pairs) == pytest.approx(0.9, abs=0.02)
    assert spread([]) is None
