"""Train a subject on: the uncompressed model as a control, a pruned one to recover, a packed one through rounding."""

import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Callable, Iterator, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from qlib.data.training_text import check_budget, held_out_windows, read_training
from qlib.errors import UserError
from qlib.evaluate.memory import track_peak
from qlib.evaluate.precision import in_float32
from qlib.models.families import blocks_of, family_of, linears_of
from qlib.models.load import Subject, load
from qlib.progress import progress
from qlib.prune.mask import mask_of
from qlib.recipe import Context
from qlib.record import Measurement
from qlib.train.fake_quant import pack_again, unpack_for_training
from qlib.train.pretrain import Schedule, Trainer, batch_at, next_token_loss

__all__ = ["Options", "SCOPE", "check", "apply", "distillation_loss", "drift"]

SCOPE = "model"
PLAIN_INTEGERS = True
HELD_OUT = 64  # windows of the development split
POINTS = 4  # of the held-out curve, after the one before training
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
    """

    tokens: int = field(default=500_000, metadata={"minimum": 1})
    length: int = field(default=256, metadata={"minimum": 2})
    batch_tokens: int = field(default=2048, metadata={"minimum": 2})
    peak_lr: float = 1e-3
    warmup: float = 0.05
    loss: Literal["cross_entropy", "distillation"] = "cross_entropy"
    text: str = "reference"

    def schedule(self, seed: int) -> Schedule:
        """These settings as `qlib.train.pretrain` wants them. Not compiled: that would take longer than it saves."""
        stages, rate = ((self.length, 1.0),), self.peak_lr
        return Schedule(
            self.tokens, self.batch_tokens, stages, rate, warmup=self.warmup, weight_decay=0.0, seed=seed, compile=False
        )


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
    check_budget(subject.tokenizer, options.text, options.tokens)


def apply(subject: Subject, options: Options, context: Context) -> Subject:
    """Train `subject.model` in place.

    fp32 weights, bf16 autocast, AdamW without decay. Packed layers are trained through rounding and packed
    again in their format (see `fake_quant`); pruned weights stay zero; norms, biases and embedding are always trained.
    A later fine-tuning pass of the same recipe reads other text, but runs the same for the same seed.

    Returns:
        the subject with ``train.*`` measurements and ``details["training"]``, one entry per fine-tuning pass.

    Raises:
        UserError: the text holds fewer tokens than asked for.
    """
    earlier, source = subject.details.get("training", []), subject.source
    schedule = options.schedule(context.seed)
    tokens = schedule.steps * schedule.batch_tokens
    stream = read_training(subject.tokenizer, options.text, tokens, [context.seed, len(earlier)])
    held_out = torch.from_numpy(held_out_windows(subject.tokenizer, options.text, options.length, HELD_OUT))
    with track_peak() as peak:
        teacher = None
        if options.loss == "distillation":
            teacher = load(source.name, str(subject.model.device), source.revision).model
        found = _train(subject.model, stream, held_out, schedule, teacher)
    training = [*earlier, {"loss": options.loss, "tokens": tokens, "steps": schedule.steps} | found]
    before = subject.measurements.get("train.peak_rss_bytes")
    costs = _costs(training, max(peak.bytes, before.value if before else 0))
    return replace(subject, measurements=subject.measurements | costs, details=subject.details | {"training": training})


def distillation_loss(logits: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of the Kullback-Leibler divergence of the teacher's prediction from the model's, in nats.

    Hinton et al. 2015 (arXiv:1503.02531) at temperature 1. Logits `[..., vocabulary]`, computed in fp32.
    """
    ours, theirs = (given.float().flatten(0, -2).log_softmax(-1) for given in (logits, teacher))
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


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
    model: nn.Module, stream: np.ndarray, held_out: torch.Tensor, schedule: Schedule, teacher: nn.Module | None
) -> dict[str, Any]:
    """Train in place; returns seconds, curve and the loss on held-out windows."""
    size, seconds, losses = schedule.batch_tokens, 0.0, []
    stops = {round(schedule.steps * point / POINTS) for point in range(1, POINTS)} - {0, schedule.steps}
    with in_float32(model):
        development = [[0, _held_out_loss(model, held_out)]]
    with _trainable(model) as masks:
        trainer = Trainer(model, schedule)
        if teacher is not None:
            trainer.loss_of = _divergence_from(teacher)
        for step in progress(0, schedule.steps, "training"):
            begun = time.perf_counter()
            losses.append(trainer.step(batch_at(stream, schedule, step), step))
            for weight, mask in masks:
                weight.data.mul_(mask)
            seconds += time.perf_counter() - begun
            if step + 1 in stops:
                development.append([(step + 1) * size, _held_out_loss(model, held_out)])
                model.train()
        del trainer  # the optimizer's state is not needed beside what comes
    with in_float32(model):
        development.append([schedule.steps * size, _held_out_loss(model, held_out)])
    return {"seconds": seconds, "curve": _thinned(losses, size), "development": development}


def _divergence_from(teacher: nn.Module) -> Callable[[nn.Module, torch.Tensor], torch.Tensor]:
    """The loss of a model on ids `[rows, length]`: how far it is from what the teacher predicts."""

    def loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            wanted = teacher(input_ids=ids, use_cache=False).logits
        return distillation_loss(model(input_ids=ids, use_cache=False).logits, wanted)

    return loss


@contextmanager
def _trainable(model: nn.Module) -> Iterator[list[tuple[nn.Parameter, torch.Tensor]]]:
    """fp32 parameters that learn; afterwards bf16 ones that do not, and packed layers where there were packed layers.

    Only parameters change their type: rotary frequencies are fp32 in a bf16 model as well. Yields the weights of pruned
    linears with their masks; those that were packed keep theirs themselves.
    """
    attention = model.config._attn_implementation
    masks = [(linear.weight, mask_of(linear)) for linear in model.modules() if isinstance(linear, nn.Linear)]
    unpack_for_training(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    model.requires_grad_(True)
    model.set_attn_implementation("eager")  # on a CPU the plain form trains faster on short windows than the fused one
    model.train()
    try:
        yield [(weight, mask) for weight, mask in masks if mask is not None]
    finally:
        model.eval()
        model.set_attn_implementation(attention)
        model.requires_grad_(False)
        pack_again(model)
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()


@torch.no_grad()
def _held_out_loss(model: nn.Module, ids: torch.Tensor, rows: int = 16) -> float:
    """Mean cross-entropy in nats over ids `[windows, length]`, in fp32."""
    model.eval()
    parts = [next_token_loss(model, part.to(model.device)).item() * len(part) for part in ids.split(rows)]
    return sum(parts) / len(ids)


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
