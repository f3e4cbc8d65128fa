"""Training: it learns, follows its schedule, and a resumed run is bit for bit the uninterrupted one."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from qlib.errors import UserError
from qlib.train import pretrain as module
from qlib.train.pretrain import Schedule, batch_at, pretrain

STREAM = np.tile(np.arange(40, dtype=np.uint16), 400)
SCHEDULE = Schedule(tokens=12 * 512, batch_tokens=512, stages=((32, 0.5), (64, 0.5)), compile=False, checkpoint_seconds=0)


def train(model, folder, schedule=SCHEDULE):
    return pretrain(model, STREAM, STREAM[:4096], schedule, folder)


def test_the_loss_falls_and_is_recorded(tiny_model, tmp_path):
    record = train(tiny_model().float(), tmp_path)
    assert record["step"] == 12 and record["curve"][-1][0] == 12 * 512
    assert record["held_out"][-1][1] < record["held_out"][0][1] - 0.5


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "bf16-pure", "bf16-kahan", "bf16-stochastic"])
def test_a_resumed_run_equals_an_uninterrupted_one(tiny_model, tmp_path, monkeypatch, precision):
    schedule = replace(SCHEDULE, precision=precision)
    whole, halves = tiny_model().float(), tiny_model().float()
    train(whole, tmp_path / "whole", schedule)
    real, calls = module.next_token_loss, []

    def failing(model, ids):
        calls.append(1)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return real(model, ids)

    monkeypatch.setattr(module, "next_token_loss", failing)
    with pytest.raises(KeyboardInterrupt):
        train(halves, tmp_path / "halves", schedule)
    monkeypatch.setattr(module, "next_token_loss", real)
    again = tiny_model(seed=1).float()  # its weights come from the checkpoint
    record = train(again, tmp_path / "halves", schedule)
    assert record["step"] == 12
    for ours, theirs in zip(whole.parameters(), again.parameters()):
        assert torch.equal(ours, theirs)


def test_another_schedule_is_refused(tiny_model, tmp_path):
    train(tiny_model().float(), tmp_path)
    changed = Schedule(**(vars(SCHEDULE) | {"peak_lr": 1e-3}))
    with pytest.raises(UserError, match="another schedule .differs in: peak_lr"):
        train(tiny_model().float(), tmp_path, changed)


def test_every_window_is_seen_once_before_any_is_seen_again():
    stream = np.arange(40 * 512, dtype=np.uint16)
    schedule = Schedule(tokens=40 * 512, batch_tokens=512, stages=((32, 0.5), (64, 0.5)))
    seen = [batch_at(stream, schedule, step).flatten() for step in range(schedule.steps)]
    assert torch.cat(seen).sort().values.tolist() == list(range(40 * 512))
    assert seen[0].reshape(-1, 32).diff(dim=1).unique().tolist() == [1]  # windows are runs of text
    assert seen[-1].reshape(-1, 64).diff(dim=1).unique().tolist() == [1]


def test_the_learning_rate_rises_and_falls():
    schedule = Schedule(tokens=100 * 8192, peak_lr=1.0, warmup=0.1, final_share=0.01)
    rates = [schedule.learning_rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == pytest.approx(1.0, abs=1e-3)
    assert rates.index(max(rates)) in (8, 9, 10) and rates[-1] == pytest.approx(0.01, abs=1e-3)
