"""Train a subject on: the uncompressed model as a control, a pruned one to recover, a packed one through rounding."""

import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Iterator, Literal

import numpy as np
import torch
from torch import nn

from qlib.data.training_text import check_budget, held_out_windows, read_training
from qlib.errors import UserError, nearest
from qlib.evaluate.memory import track_peak
from qlib.evaluate.precision import in_float32
from qlib.models.families import blocks_of, family_of, linears_of
from qlib.models.load import Subject, load
from qlib.progress import progress
from qlib.recipe import Context
from qlib.record import Measurement
from qlib.train.early import Best
from qlib.train.losses import distillation_loss, divergence_from, held_out_loss
from qlib.train.pretrain import Schedule, Trainer, batch_at
from qlib.train.ways import WAYS

__all__ = ["Options", "SCOPE", "check", "apply", "distillation_loss", "drift"]

SCOPE = "model"
PLAIN_INTEGERS = True
HELD_OUT = 64  # windows of the development split
POINTS, MANY_POINTS = 4, 16  # of the held-out curve, after the one before training; and where it decides when to stop
CURVE = 40  # points of the training curve, at most


@dataclass(frozen=True)
class Options:
    """Options of a fine-tuning pass.

    Args:
        tokens: how many to train on; each is seen once.
        length: tokens of a window.
        batch_tokens: tokens of a step, a multiple of the length.
        peak_lr: learning rate after the warm-up; it falls along a cosine to nearly nothing.
        warmup: share of the steps over which the learning rate rises.
        loss: cross_entropy of the next token, or distillation: the divergence from the uncompressed model's prediction.
        text: "reference" for the training split of the shipped corpus, or a text file or folder.
        hidden: with distillation, how much the relative distance of hidden states counts beside the divergence.
        patience: held-out losses in a row, of 16, that may be no better than the best before training stops; the best
            weights are kept then. null: train to the end and keep the last.
        train: what learns. full: everything; lora: low-rank adapters beside the linears, merged into them at the end;
            scales: scales and zeros of packed layers.
        rank: of the adapters.
        alpha: times what the adapters add, divided by the rank.
        merge: put adapters into the weights at the end; otherwise they stay beside the codes, and cost memory and time.
        targets: which linears have adapters, e.g. [q_proj, v_proj]; null: all linears of the blocks.
    """

    tokens: int = field(default=500_000, metadata={"minimum": 1})
    length: int = field(default=256, metadata={"minimum": 2})
    batch_tokens: int = field(default=2048, metadata={"minimum": 2})
    peak_lr: float = 1e-3
    warmup: float = 0.05
    loss: Literal["cross_entropy", "distillation"] = "cross_entropy"
    text: str = "reference"
    hidden: float = field(default=0.0, metadata={"minimum": 0})
    patience: int | None = field(default=None, metadata={"minimum": 0})
    train: Literal["full", "lora", "scales"] = "full"
    rank: int = field(default=16, metadata={"minimum": 1})
    alpha: float = 16.0
    merge: bool = True
    targets: list[str] | None = None

    def schedule(self, seed: int) -> Schedule:
        """These settings as `qlib.train.pretrain` wants them. Not compiled: that would take longer than it saves."""
        stages, rate = ((self.length, 1.0),), self.peak_lr
        return Schedule(
            self.tokens, self.batch_tokens, stages, rate, warmup=self.warmup, weight_decay=0.0, seed=seed, compile=False
        )


def needs_grid(options: Options) -> bool:
    """Whether there is nothing to train without packed layers."""
    return options.train == "scales" or not options.merge


def check(subject: Subject, options: Options) -> None:
    """Refuse settings that cannot work.

    Raises:
        UserError: one line that begins with the option's name.
    """
    context = getattr(subject.config, "max_position_embeddings", options.length)
    if options.tokens < 1:
        raise UserError(f"tokens: {options.tokens} is not allowed; allowed: at least 1")
    if not 2 <= options.length <= context:
        raise UserError(f"length: {options.length} is not allowed; allowed: 2 to {context}, the model's context")
    if options.batch_tokens < options.length or options.batch_tokens % options.length:
        raise UserError(
            f"batch_tokens: {options.batch_tokens} is not allowed; allowed: multiples of the length {options.length}"
        )
    if options.peak_lr <= 0:
        raise UserError(f"peak_lr: {options.peak_lr} is not allowed; allowed: more than 0")
    if not 0 <= options.warmup < 1:
        raise UserError(f"warmup: {options.warmup} is not allowed; allowed: 0 to less than 1")
    if options.hidden < 0 or (options.hidden and options.loss != "distillation"):
        raise UserError(f"hidden: {options.hidden} is not allowed with loss {options.loss}; allowed: 0, or more with distillation")
    if options.patience is not None and options.patience < 0:
        raise UserError(f"patience: {options.patience} is not allowed; allowed: at least 0, or null")
    if not options.merge and options.train != "lora":
        raise UserError(f"merge: false is not allowed with train: {options.train}; allowed: true")
    _refuse_adapters(subject.model)
    if options.train not in WAYS:
        raise UserError(f"train: '{options.train}' is unknown{nearest(options.train, WAYS)}; allowed: {', '.join(WAYS)}")
    WAYS[options.train].check(subject, options)
    check_budget(subject.tokenizer, options.text, options.tokens)


def apply(subject: Subject, options: Options, context: Context) -> Subject:
    """Train `subject.model` in place.

    fp32 weights, bf16 autocast, AdamW without decay. What learns depends on the way (see `qlib.train.ways`); packed
    layers are packed again in their format, and pruned weights stay zero.
    A later fine-tuning pass of the same recipe reads other text, but runs the same for the same seed.

    Returns:
        the subject with ``train.*`` measurements and ``details["training"]``, one entry per fine-tuning pass.

    Raises:
        UserError: the text holds fewer tokens than asked for.
    """
    _refuse_adapters(subject.model)
    earlier, source = subject.details.get("training", []), subject.source
    schedule = options.schedule(context.seed)
    tokens = schedule.steps * schedule.batch_tokens
    stream = read_training(subject.tokenizer, options.text, tokens, [context.seed, len(earlier)])
    held_out = torch.from_numpy(held_out_windows(subject.tokenizer, options.text, options.length, HELD_OUT))
    with track_peak() as peak:
        teacher = None
        if options.loss == "distillation":
            teacher = load(source.name, str(subject.model.device), source.revision).model
        found = _train(subject.model, stream, held_out, options, context.seed, teacher)
    training = [*earlier, {"loss": options.loss} | found]
    before = subject.measurements.get("train.peak_rss_bytes")
    costs = _costs(training, max(peak.bytes, before.value if before else 0))
    return replace(subject, measurements=subject.measurements | costs, details=subject.details | {"training": training})


def _refuse_adapters(model: nn.Module) -> None:
    if any(getattr(one, "adapter_up", None) is not None for one in model.modules()):
        raise UserError("train: the model has adapters beside its codes, which would be lost; merge them (merge: true)")


def _costs(training: list[dict[str, Any]], peak: float) -> dict[str, Measurement]:
    """Measurements over all passes so far."""
    seconds, tokens = (sum(entry[name] for entry in training) for name in ("seconds", "tokens"))
    wall = "wall time of the training steps, without reading text and held-out loss"
    rate = Measurement(tokens / seconds, "tokens/s", len(training), method="tokens over train.seconds")
    memory = "highest anonymous memory of the process while it trains, sampled"
    return {
        "train.seconds": Measurement(seconds, "seconds", len(training), method=wall),
        "train.tokens_per_second": rate,
        "train.peak_rss_bytes": Measurement(peak, "bytes", len(training), method=memory),
    }


def _train(
    model: nn.Module, stream: np.ndarray, held_out: torch.Tensor, options: Options, seed: int, teacher: nn.Module | None
) -> dict[str, Any]:
    """Train in place; returns tokens, steps, seconds, curve, the loss on held-out windows and how many parameters learned."""
    schedule, way = options.schedule(seed), WAYS[options.train]
    size, seconds, losses = schedule.batch_tokens, 0.0, []
    points = POINTS if options.patience is None else MANY_POINTS
    stops = {round(schedule.steps * point / points) for point in range(1, points + (options.patience is not None))} - {0}
    with in_float32(model):
        development = [[0, held_out_loss(model, held_out)]]
    with _training(model), way.trainable(model, options, seed) as settle:
        best = Best(model, options.patience)
        trainer = Trainer(model, schedule)
        if teacher is not None:
            trainer.loss_of = divergence_from(teacher, options.hidden)
        for step in progress(0, schedule.steps, "training"):
            begun = time.perf_counter()
            losses.append(trainer.step(batch_at(stream, schedule, step), step))
            settle()
            seconds += time.perf_counter() - begun
            if step + 1 in stops:
                development.append([(step + 1) * size, held_out_loss(model, held_out)])
                model.train()
                if best.tell(development[-1][1]):
                    break
        del trainer  # the optimizer's state is not needed beside what comes
        best.restore()
    with in_float32(model):
        development.append([len(losses) * size, held_out_loss(model, held_out)])
    learning = sum(parameter.numel() for parameter in best.parameters)
    found = {"way": options.train, "trained_parameters": learning} | way.describe(options)
    found |= {"tokens": len(losses) * size, "steps": len(losses), "seconds": seconds}
    return found | {"curve": _thinned(losses, size), "development": development}


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """fp32 parameters in training; afterwards bf16 ones that do not learn.

    Only parameters change their type: rotary frequencies are fp32 in a bf16 model as well.
    """
    attention = model.config._attn_implementation
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    model.set_attn_implementation("eager")  # on a CPU the plain form trains faster on short windows than the fused one
    model.train()
    try:
        yield
    finally:
        model.eval()
        model.set_attn_implementation(attention)
        model.requires_grad_(False)
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()


def _thinned(losses: list[float], batch_tokens: int) -> list[list[float]]:
    """Means over neighbouring steps, at most `CURVE` of them, each at the number of tokens behind it."""
    parts = np.array_split(np.array(losses), min(len(losses), CURVE))
    ends = np.cumsum([len(part) for part in parts]) * batch_tokens
    return [[int(end), float(part.mean())] for end, part in zip(ends, parts)]


@torch.no_grad()
def drift(model: nn.Module, original: nn.Module) -> list[dict[str, Any]]:
    """How far the weight of every linear is from the original one: name, and error relative to the original's norm.

    Linears that have another shape than the original are left out.
    """
    found = []
    for index, (ours, theirs) in enumerate(zip(blocks_of(model), blocks_of(original))):
        for name, linear in linears_of(model, ours).items():
            other = linears_of(original, theirs)[name].weight.float()
            weight = linear.compressed().dequantize() if hasattr(linear, "compressed") else linear.weight.float()
            if weight.shape == other.shape:
                path = f"{family_of(model.config).blocks}.{index}.{name}"
                found.append({"name": path, "error": ((weight - other).norm() / other.norm()).item()})
    return found
