"""The benchmark of training precisions: both take the same steps, in turns."""

import numpy as np

from qlib.bench import bench_training


def test_every_step_of_each_precision_is_timed():
    sizes = {"layers": 1, "hidden": 64, "ffn": 128, "heads": 2, "vocab": 300}
    seconds = bench_training.step_seconds(("fp32", "bf16"), sizes, 3, batch_tokens=512)
    assert set(seconds) == {"fp32", "bf16"} and all(one.shape == (3,) and (one > 0).all() for one in seconds.values())


def test_the_first_step_does_not_count(monkeypatch, tmp_path):
    times = {"fp32": np.array([9.0, 2.0, 2.0, 2.0]), "bf16": np.array([1.0, 1.0, 1.0, 1.0])}
    monkeypatch.setattr(bench_training, "step_seconds", lambda *told: times)
    (row,) = bench_training.measure(tmp_path)
    assert row.measured == 2 and row.met and "fp32 2.00 s, bf16 1.00 s" in row.how
