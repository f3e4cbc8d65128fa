"""Intervals against plain loops, and against what theory says about their width."""

import numpy as np

from qlib.evaluate.statistics import paired_interval, ratio_interval, resample


def test_resamples_draw_as_many_documents_as_there_are_and_leave_the_global_state():
    state = np.random.get_state()[1].copy()
    draws = resample(50, 200, seed=3)
    assert draws.shape == (200, 50) and (draws.sum(1) == 50).all()
    assert np.array_equal(draws, resample(50, 200, seed=3)) and not np.array_equal(draws, resample(50, 200, seed=4))
    assert np.array_equal(np.random.get_state()[1], state)


def test_ratio_interval_is_what_a_loop_computes():
    generator = np.random.default_rng(0)
    totals, counts, draws = generator.normal(30, 5, 20), generator.integers(5, 15, 20), resample(20, 300, 0)
    looped = []
    for draw in draws:
        chosen = np.repeat(np.arange(20), draw)
        looped.append(np.exp(totals[chosen].sum() / counts[chosen].sum()))
    value, low, high = ratio_interval(totals, counts, draws, np.exp)
    assert np.isclose(value, np.exp(totals.sum() / counts.sum()))
    assert np.allclose([low, high], np.quantile(looped, [0.025, 0.975]))


def test_the_interval_of_a_mean_has_the_width_theory_gives():
    values = np.random.default_rng(1).normal(0, 1, 400)
    _, low, high = ratio_interval(values, np.ones(400), resample(400, 4000, 0))
    assert np.isclose(high - low, 2 * 1.96 * values.std() / 20, rtol=0.06)


def test_pairing_removes_what_documents_have_in_common():
    generator = np.random.default_rng(2)
    hard, counts, draws = generator.normal(50, 20, 100), np.full(100, 10), resample(100, 1000, 0)
    first, second = hard + 1 + generator.normal(0, 0.1, 100), hard
    value, low, high = paired_interval(first, second, counts, draws, lambda a, b: a - b)
    assert np.isclose(value, (first - second).sum() / 1000) and low > 0
    assert high - low < 0.1 * np.subtract(*ratio_interval(first, counts, draws)[:0:-1])


def test_documents_without_items_do_not_break_a_resample():
    totals, counts = np.array([3.0, 0, 0, 0]), np.array([4.0, 0, 0, 0])
    value, low, high = ratio_interval(totals, counts, resample(4, 200, 0))
    assert value == low == high == 0.75
