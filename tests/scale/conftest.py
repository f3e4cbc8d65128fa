"""Tests of timings do not wait for the machine's timing lock."""

import pytest

from qlib.evaluate import timing


@pytest.fixture(autouse=True)
def own_lock(monkeypatch, tmp_path):
    monkeypatch.setattr(timing, "LOCK", tmp_path / "lock")
