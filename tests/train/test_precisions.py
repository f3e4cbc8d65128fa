"""Training precisions: the same data for all, fp32 really in fp32, fp16 safe from overflow, and figures that add up."""

import multiprocessing
import os
from importlib import import_module
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch

from qlib.errors import UserError
from qlib.params.strategy import PRECISIONS
from qlib.record import check_measurements, plain
from qlib.train import precision_figures as figures
from qlib.train import precisions as module
from qlib.train.precisions import Run, check_precisions, random_weights, schedule_of
from qlib.train.precision import FORMATS, INITIAL_SCALE, Precision, products
from qlib.train.pretrain import Schedule, Trainer, batch_at, next_token_loss, pretrain
from qlib.train.remote import Remote

STREAM = np.tile(np.arange(40, dtype=np.uint16), 60)
TRAINING = SimpleNamespace(tokens=16 * 128, length=32, batch_tokens=128, peak_lr=2e-3, seeds=2, fp16_steps=12)


def trainer(model, precision, **changes):
    sizes = {"tokens": 20 * 128, "batch_tokens": 128, "stages": ((32, 1.0),), "compile": False}
    return Trainer(model.float().train(), Schedule(**(sizes | changes), precision=precision))


def run_steps(training, count=4):
    return [training.step(batch_at(STREAM, training.schedule, step), step) for step in range(count)]


def test_strategy_files_know_the_same_precisions():
    assert PRECISIONS == get_args(Precision) == tuple(FORMATS)


def test_every_precision_sees_the_same_batches_in_the_same_order():
    schedules = [schedule_of(TRAINING, precision) for precision in ("fp32", "bf16", "fp16")]
    assert {schedule.steps for schedule in schedules} == {16}
    for step in range(16):
        batches = [batch_at(STREAM, schedule, step) for schedule in schedules]
        assert all(torch.equal(batch, batches[0]) for batch in batches)
        assert len({schedule.learning_rate(step) for schedule in schedules}) == 1


@pytest.mark.parametrize(
    "precision, inside", [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_products_run_in_the_precision_and_nothing_else_does(tiny_model, precision, inside):
    training, seen = trainer(tiny_model(), precision), []
    block = training.model.model.layers[0]
    block.mlp.down_proj.register_forward_hook(lambda part, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):  # not even where the caller has autocast on
        run_steps(training, 1)
    assert seen == [inside]
    assert all(parameter.dtype == torch.float32 for parameter in training.model.parameters())
    state = training.optimizer.state.values()
    assert all(one["exp_avg"].dtype == torch.float32 for one in state)
    assert torch.get_float32_matmul_precision() == "highest"


def test_fp32_is_the_plain_step(tiny_model):
    """Against the same step written out with autograd and AdamW."""
    training, plain = trainer(tiny_model(), "fp32"), tiny_model().float().train()
    losses = run_steps(training, 3)
    groups = [
        {"params": [p for p in plain.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in plain.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    for step in range(3):
        for group in optimizer.param_groups:
            group["lr"] = training.schedule.learning_rate(step)
        loss = next_token_loss(plain, batch_at(STREAM, training.schedule, step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert loss.item() == losses[step]
    for ours, theirs in zip(training.model.parameters(), plain.parameters()):
        assert torch.equal(ours, theirs)


def test_fp16_follows_fp32_closely(tiny_model):
    exact, low = (trainer(tiny_model(), precision) for precision in ("fp32", "fp16"))
    losses = np.array([run_steps(exact), run_steps(low)])
    assert np.abs(losses[0] - losses[1]).max() < 5e-3 and losses[0, 0] > losses[0, -1]
    assert low.skipped == 0 and low.scale == INITIAL_SCALE and exact.scale == 1
    weights = [torch.cat([p.flatten() for p in one.model.parameters()]) for one in (exact, low)]
    # The mean: where a tiny gradient changes its sign, Adam steps by the whole rate.
    assert (weights[0] - weights[1]).abs().mean() < 1e-4


def test_a_step_that_overflows_is_left_out_and_the_scale_halved(tiny_model):
    training = trainer(tiny_model(), "fp16")
    run_steps(training, 1)
    before = [parameter.detach().clone() for parameter in training.model.parameters()]
    moments = [state["exp_avg"].clone() for state in training.optimizer.state.values()]
    real = training.loss_of
    training.loss_of = lambda model, ids: real(model, ids) * 1e36  # times the scale beyond what fp32 holds
    training.step(batch_at(STREAM, training.schedule, 1), 1)
    assert training.skipped == 1 and training.scale == INITIAL_SCALE / 2
    assert all(torch.equal(a, b) for a, b in zip(before, training.model.parameters()))
    assert all(torch.equal(a, state["exp_avg"]) for a, state in zip(moments, training.optimizer.state.values()))
    training.loss_of = real
    training.step(batch_at(STREAM, training.schedule, 1), 1)
    assert training.skipped == 1 and not torch.equal(before[0], next(iter(training.model.parameters())))


def test_without_a_scale_small_gradients_are_lost_and_counted(tiny_model):
    shares = {}
    for precision in ("fp32", "fp16", "fp16-unscaled"):
        training = trainer(tiny_model(), precision)
        real = training.loss_of
        training.loss_of = lambda model, ids: real(model, ids) * 1e-4  # gradients as small as those of large models
        training.watch = True
        run_steps(training, 1)
        shares[precision] = training.zeros
    assert shares["fp32"] < 0.01 and shares["fp16"] < 0.02 and shares["fp16-unscaled"] > 0.2


@pytest.mark.parametrize("precision", ["bf16-pure", "bf16-kahan", "bf16-stochastic"])
def test_pure_bf16_holds_nothing_in_fp32(tiny_model, precision):
    training = trainer(tiny_model(), precision)
    losses = run_steps(training, 6)
    assert all(parameter.dtype == torch.bfloat16 for parameter in training.model.parameters())
    state = [one for states in training.optimizer.state.values() for name, one in states.items() if name != "step"]
    assert state and all(one.dtype == torch.bfloat16 for one in state)
    exact = run_steps(trainer(tiny_model(), "fp32"), 6)
    assert losses[-1] < losses[0] and abs(losses[-1] - exact[-1]) < 0.1


def test_an_interrupted_fp16_run_keeps_its_scale(tiny_model, tmp_path):
    schedule = Schedule(tokens=4 * 128, batch_tokens=128, stages=((32, 1.0),), compile=False, precision="fp16")
    record = pretrain(tiny_model().float(), STREAM, STREAM[:2048], schedule, tmp_path)
    assert record["scaler"]["scale"] == INITIAL_SCALE
    again = pretrain(tiny_model(seed=1).float(), STREAM, STREAM[:2048], schedule, tmp_path)
    assert again["step"] == 4 and again["scaler"] == record["scaler"]
    other = Schedule(**(vars(schedule) | {"precision": "bf16"}))
    with pytest.raises(UserError, match="another schedule .differs in: precision"):
        pretrain(tiny_model().float(), STREAM, STREAM[:2048], other, tmp_path)


@pytest.mark.parametrize(
    "precisions, words",
    [
        (["fp32", "tf32"], "precision: 'tf32' is a format of NVIDIA's tensor cores, the device is cpu"),
        (["fp32", "fp8"], "precision: 'fp8' is unknown; allowed: fp32, tf32, bf16, fp16, fp16-unscaled, bf16-pure, bf16-kahan, bf16-stochastic"),
        (["bf16"], "formats: fp32 is missing"),
        (["fp32", "bf16", "bf16"], "formats: 'bf16' is given twice"),
    ],
)
def test_what_cannot_be_compared_is_refused(precisions, words):
    with pytest.raises(UserError) as caught:
        check_precisions(precisions, "cpu")
    assert str(caught.value).startswith(words)
    model = torch.nn.Linear(2, 2)
    if "tf32" in precisions:
        with pytest.raises(UserError, match="tf32"):
            Trainer(model, Schedule(tokens=8, precision="tf32"))


def test_tf32_leaves_the_global_setting_alone():
    torch.set_float32_matmul_precision("medium")
    try:
        for precision, wanted in (("tf32", "high"), ("fp32", "highest"), ("bf16", "medium")):
            with pytest.raises(ValueError), products(precision):
                assert torch.get_float32_matmul_precision() == wanted
                raise ValueError
            assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_seed_gives_the_same_weights_and_leaves_the_callers_alone(tiny_model):
    config, state = tiny_model().config, torch.get_rng_state()
    first, second, other = (random_weights(config, seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state) and first.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


class InProcess:
    """In the place of `Remote` where a fresh process would only take time."""

    def __init__(self, kind, *arguments):
        self.served = kind(*arguments)

    def __call__(self, method, *given):
        return getattr(self.served, method)(*given)

    def close(self):
        pass


@pytest.fixture
def compared(model_folder, tmp_path, monkeypatch):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(60):
        lines = (f"def add_{number}_{line}(first, second):\n    return first + {line}\n" for line in range(20))
        (folder / f"file{number}.py").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.setattr(module, "Remote", InProcess)
    evaluation = SimpleNamespace(text=str(folder), documents=6, length=64, bootstrap=50)
    texts = SimpleNamespace(text=str(folder))
    return module.compare_precisions(TRAINING, ["fp32", "bf16", "fp16"], str(model_folder()), texts, evaluation, seed=5)


def test_what_is_measured_of_each_precision(compared):
    always = {"train.seconds", "train.tokens_per_second", "train.peak_rss_bytes"}
    whole = {"quality.perplexity", "quality.perplexity_ratio"}
    found = {name: set(measures) for name, measures in compared.formats.items()}
    assert found["fp32"] == always | {"quality.perplexity"}
    assert found["bf16"] == always | whole | {"train.loss_difference"}
    assert found["fp16"] == always | {"train.loss_difference"}, "fp16 ends early, so it has no final quality"
    ratio = compared.formats["bf16"]["quality.perplexity_ratio"]
    by_seed = compared.details["by_seed"]
    logs = np.log([[by_seed[name][seed] for seed in ("5", "6")] for name in ("bf16", "fp32")]).mean(1)
    assert ratio.value == pytest.approx(np.exp(logs[0] - logs[1]), rel=1e-9) and ratio.low <= ratio.value <= ratio.high
    assert abs(ratio.value - 1) < 0.02
    difference = compared.formats["fp16"]["train.loss_difference"]
    assert difference.low <= difference.value <= difference.high and abs(difference.value) < 0.01
    assert "steps 3 to 12" in difference.conditions
    curves = compared.details["curves"]
    assert [point[0] for point in curves["fp32"]["5"]] == [1280, 2048] and curves["fp32"].keys() == {"5", "6"}
    assert [point[0] for point in curves["fp16"]["6"]] == [1280, 1536]
    assert curves["fp32"]["5"] != curves["fp32"]["6"] and curves["fp32"]["5"][0][1] > curves["fp32"]["5"][-1][1]
    assert compared.details["loss_scale"]["5"] == [(10, INITIAL_SCALE), (12, INITIAL_SCALE)]
    assert compared.details["speedup"]["fp32"][0] == 1
    for name, measures in compared.formats.items():
        check_measurements(measures, None, name)
    plain(compared.details, "details")


def test_the_loss_difference_is_that_of_the_same_steps():
    base, own = {"losses": [5.0, 4.0, 3.0, 2.0]}, {"losses": [5.0, 4.1, 3.3]}
    found = figures._loss_difference([own], [base])
    assert found.value == pytest.approx(0.4 / 3) and found.conditions == "steps 1 to 3" and found.n == 3
    several = figures._loss_difference([own, {"losses": [5.0, 4.0, 3.0]}], [base, base])
    expected = (pytest.approx(0.2 / 3), 0, pytest.approx(0.4 / 3), 2)
    assert (several.value, several.low, several.high, several.n) == expected


def test_an_object_in_a_process_of_its_own():
    remote = Remote(import_module, "os")
    try:
        assert remote("getpid") == remote("getpid") != os.getpid()
        with pytest.raises(FileNotFoundError, match="nowhere"):
            remote("stat", "nowhere")
        assert remote("getppid") == os.getpid()
        with pytest.raises(RuntimeError, match="ended without an answer, exit code 3"):
            remote("_exit", 3)
    finally:
        remote.close()
    assert not multiprocessing.active_children()


def test_a_run_reports_the_memory_it_took(tiny_model):
    run = Run(tiny_model().config, schedule_of(TRAINING, "bf16"), STREAM, "cpu", torch.get_num_threads())
    before = run.begin(0)
    found = run.steps(0, 3)
    assert len(found["losses"]) == 3 and found["peak"] >= before > 0 and found["seconds"] > 0 and found["scale"] == 1
