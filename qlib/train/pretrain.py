"""Train a small causal language model from random weights: checkpointed, resumable, the same for the same seed."""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from qlib.errors import UserError
from qlib.progress import clock
from qlib.train.bf16_adamw import Bf16AdamW
from qlib.train.precision import FORMATS, INITIAL_SCALE, Precision, check_precision, products

__all__ = ["Schedule", "Trainer", "pretrain", "batch_at", "next_token_loss"]


@dataclass(frozen=True)
class Schedule:
    """How to train. Lengths in tokens; `stages` are pairs of (sequence length, share of the token budget)."""

    tokens: int
    batch_tokens: int = 8192
    stages: tuple[tuple[int, float], ...] = ((128, 0.7), (256, 0.3))
    peak_lr: float = 4e-3
    final_share: float = 0.01
    warmup: float = 0.02
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    compile: bool = True
    checkpoint_seconds: float = 120.0
    precision: Precision = "bf16"

    @property
    def steps(self) -> int:
        return max(self.tokens // self.batch_tokens, 1)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then a cosine to `final_share` of the peak."""
        done = (step + 1) / self.steps
        if done < self.warmup:
            return self.peak_lr * done / self.warmup
        cosine = 0.5 * (1 + np.cos(np.pi * (done - self.warmup) / (1 - self.warmup)))
        return self.peak_lr * (self.final_share + (1 - self.final_share) * cosine)

    def stage(self, step: int) -> tuple[int, int, int]:
        """Sequence length at a step, and the range of steps that have it."""
        first, edge = 0, 0.0
        for length, share in self.stages[:-1]:
            edge += share
            stop = round(edge * self.steps)
            if step < stop:
                return length, first, stop
            first = stop
        return self.stages[-1][0], first, self.steps


def batch_at(stream: np.ndarray, schedule: Schedule, step: int) -> torch.Tensor:
    """The ids `[rows, length]` of one step: a pure function of seed and step, so a resumed run sees the same order.

    Windows of one stage are a random permutation of the part of the stream that the stage has not used yet.
    """
    length, first, stop = schedule.stage(step)
    rows = schedule.batch_tokens // length
    offset = first * schedule.batch_tokens % len(stream)
    windows = min(len(stream) // length, (stop - first) * rows)
    epoch, at = divmod((step - first) * rows, windows)
    order = _permutation(windows, schedule.seed + 7919 * epoch + length)
    picks = [order[(at + i) % windows] for i in range(rows)]
    index = (offset + np.array(picks)[:, None] * length + np.arange(length)) % len(stream)
    return torch.from_numpy(stream[index].astype(np.int64))


_ORDERS: dict[tuple[int, int], np.ndarray] = {}


def _permutation(n: int, seed: int) -> np.ndarray:
    if (n, seed) not in _ORDERS:
        _ORDERS.clear()
        _ORDERS[n, seed] = np.random.default_rng(seed).permutation(n)
    return _ORDERS[n, seed]


def next_token_loss(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats of every token but the first, computed in fp32."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


class Trainer:
    """Trains `model` in place, one step at a time, in the schedule's precision.

    Mixed precision is autocast: matrix products in 16 bits, everything else in fp32. fp16 reaches down to 6e-8 only, so
    its loss is scaled up before the backward pass, and a step whose gradients overflow is left out and the scale halved
    (Micikevicius et al. 2018). Pure bf16 turns the parameters into bf16.

    Attributes:
        skipped: steps that were left out. zeros: share of the gradients of the linears in blocks that was 0 in the last step,
            if `watch`; in fp32 hardly any is.
        watch: whether to count them.

    Raises:
        UserError: the device does not know the precision.
    """

    def __init__(self, model: torch.nn.Module, schedule: Schedule):
        self.model, self.schedule, self.skipped = model, schedule, 0
        self.watch, self.zeros = False, 0.0
        self.device = next(model.parameters()).device.type
        check_precision(schedule.precision, self.device)
        self.format = FORMATS[schedule.precision]
        for parameter in model.parameters():
            parameter.data = parameter.data.to(self.format.weights)
        decay = [p for p in model.parameters() if p.ndim > 1]
        plain = [p for p in model.parameters() if p.ndim <= 1]
        groups = [{"params": decay, "weight_decay": schedule.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        told = {"lr": schedule.peak_lr, "betas": (0.9, 0.95)}
        if self.format.weights == torch.bfloat16:
            self.optimizer = Bf16AdamW(groups, **told, rounding=self.format.rounding, seed=schedule.seed)
        else:
            self.optimizer = torch.optim.AdamW(groups, **told, fused=True)
        self.scaler = torch.amp.GradScaler(self.device, init_scale=INITIAL_SCALE, enabled=self.format.scaled)
        self.loss_of = torch.compile(next_token_loss, dynamic=False) if schedule.compile else next_token_loss

    @property
    def scale(self) -> float:
        """What the loss is multiplied by: 1 but for fp16."""
        return self.scaler.get_scale()

    def step(self, ids: torch.Tensor, number: int) -> float:
        """Take step `number` of the schedule on token ids `[rows, length]` and return the loss before it in nats."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.learning_rate(number)
        inside = self.format.autocast
        with products(self.schedule.precision):
            with torch.autocast(self.device, dtype=inside, enabled=inside is not None):
                loss = self.loss_of(self.model, ids.to(self.device))
            self.scaler.scale(loss).backward()
        if self.watch:
            self.zeros = _zero_share(self.model)
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.schedule.clip)
        before = self.scale
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.skipped += self.scale < before
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


def _zero_share(model: torch.nn.Module) -> float:
    """Share of the gradients of all linears but the head that is exactly 0.

    Those of the embedding are left out: rows of tokens that a batch does not have are 0 in any format.
    """
    head = model.get_output_embeddings()
    linears = (one for one in model.modules() if isinstance(one, torch.nn.Linear) and one is not head)
    found = [(one.weight.grad == 0).float().mean().item() for one in linears if one.weight.grad is not None]
    return float(np.mean(found)) if found else 0.0


def pretrain(
    model: torch.nn.Module, stream: np.ndarray, held_out: np.ndarray, schedule: Schedule, folder: Path
) -> dict[str, Any]:
    """Train `model` in place and return the training record (curve, tokens, seconds).

    `folder` receives a checkpoint every `schedule.checkpoint_seconds`; a call with the same schedule goes on from it.

    Raises:
        UserError: the folder holds a checkpoint of another schedule; the device does not know the precision.
    """
    folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(model, schedule)
    record = _restore(model, trainer, schedule, folder)
    model.train()
    begun, before, saved = time.perf_counter(), record["seconds"], time.perf_counter()
    window: list[float] = []
    for step in range(record["step"], schedule.steps):
        window.append(trainer.step(batch_at(stream, schedule, step), step))
        record |= {"step": step + 1, "seconds": before + time.perf_counter() - begun}
        last = step + 1 == schedule.steps
        if len(window) == 50 or last:
            record["curve"].append([(step + 1) * schedule.batch_tokens, round(float(np.mean(window)), 4)])
            window = []
        if last or time.perf_counter() - saved > schedule.checkpoint_seconds:
            record["held_out"].append([(step + 1) * schedule.batch_tokens, round(_loss(model, held_out), 4)])
            _checkpoint(model, trainer, record, folder)
            left = record["seconds"] / (step + 1) * (schedule.steps - step - 1)
            print(
                f"step {step + 1}/{schedule.steps}  loss {record['curve'][-1][1] if record['curve'] else 0:.3f}  "
                f"held-out {record['held_out'][-1][1]:.3f}  {clock(left)} left",
                flush=True,
            )
            saved = time.perf_counter()
    model.eval()
    return record


@torch.no_grad()
def _loss(model: torch.nn.Module, held_out: np.ndarray, length: int = 256, rows: int = 128) -> float:
    """Held-out loss over at most `rows` windows, in fp32."""
    rows = min(rows, len(held_out) // length)
    ids = torch.from_numpy(held_out[: rows * length].astype(np.int64).reshape(rows, length))
    device = next(model.parameters()).device
    model.eval()
    losses = [next_token_loss(model, chunk.to(device)).item() * len(chunk) for chunk in ids.split(16)]
    model.train()
    return sum(losses) / rows


def _checkpoint(model: torch.nn.Module, trainer: Trainer, record: dict, folder: Path) -> None:
    from safetensors.torch import save_file

    if trainer.scaler.is_enabled():
        record["scaler"] = trainer.scaler.state_dict()
    tensors = {f"model.{k}": v.detach().clone() for k, v in model.named_parameters()}
    for index, state in trainer.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": v.clone() for k, v in state.items()}
    save_file(tensors, folder / "checkpoint.tmp", metadata={"record": json.dumps(record)})
    os.replace(folder / "checkpoint.tmp", folder / "checkpoint.safetensors")


def _restore(model: torch.nn.Module, trainer: Trainer, schedule: Schedule, folder: Path) -> dict:
    """Load the last checkpoint, or return the record of a run that has not begun."""
    fresh = {"schedule": json.loads(json.dumps(asdict(schedule))), "step": 0, "seconds": 0.0, "curve": [], "held_out": []}
    path = folder / "checkpoint.safetensors"
    if not path.exists():
        return fresh
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        record = json.loads(file.metadata()["record"])
        record["schedule"].setdefault("precision", "bf16")  # what there was before there was a choice
        if record["schedule"] != fresh["schedule"]:
            changed = [k for k, v in fresh["schedule"].items() if record["schedule"].get(k) != v]
            raise UserError(f"{path}: was written with another schedule (differs in: {', '.join(changed)}); remove it")
        for name, parameter in model.named_parameters():
            parameter.data.copy_(file.get_tensor(f"model.{name}"))
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key in file.keys():
            if key.startswith("optimizer."):
                _, index, name = key.split(".")
                state.setdefault(int(index), {})[name] = file.get_tensor(key)
    groups = trainer.optimizer.state_dict()["param_groups"]
    trainer.optimizer.load_state_dict({"state": state, "param_groups": groups})
    if trainer.scaler.is_enabled():
        trainer.scaler.load_state_dict(record["scaler"])
    return record
