"""What training lowers and is judged by: next tokens, a teacher's predictions, held-out text."""

from typing import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from qlib.train.pretrain import next_token_loss

__all__ = ["distillation_loss", "hidden_loss", "divergence_from", "held_out_loss"]


def distillation_loss(logits: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of the Kullback-Leibler divergence of the teacher's prediction from the model's, in nats.

    Hinton et al. 2015 (arXiv:1503.02531) at temperature 1. Logits `[..., vocabulary]`, computed in fp32.
    """
    ours, theirs = (given.float().flatten(0, -2).log_softmax(-1) for given in (logits, teacher))
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def hidden_loss(states: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean over blocks of the squared distance of hidden states `[rows, tokens, hidden]`, relative to the teacher's square.

    As in TinyBERT (Jiao et al. 2020, arXiv:1909.10351), without its projection: widths are equal. Where blocks are gone the
    states behind the last block are compared alone.
    """
    pairs = list(zip(states, teacher, strict=True)) if len(states) == len(teacher) else [(states[-1], teacher[-1])]
    off = [(ours.float() - theirs.float()).square().mean() / theirs.float().square().mean() for ours, theirs in pairs]
    return torch.stack(off).mean()


def divergence_from(teacher: nn.Module, hidden: float = 0.0) -> Callable[[nn.Module, torch.Tensor], torch.Tensor]:
    """The loss of a model on ids `[rows, length]`: how far it is from what the teacher predicts.

    Args:
        hidden: how much the distance of hidden states counts beside the divergence of predictions.
    """

    def loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        more = {"use_cache": False, "output_hidden_states": hidden > 0}
        with torch.no_grad():
            wanted = teacher(input_ids=ids, **more)
        found = model(input_ids=ids, **more)
        divergence = distillation_loss(found.logits, wanted.logits)
        if not hidden:
            return divergence
        return divergence + hidden * hidden_loss(found.hidden_states[1:], wanted.hidden_states[1:])

    return loss


@torch.no_grad()
def held_out_loss(model: nn.Module, ids: torch.Tensor, rows: int = 16) -> float:
    """Mean cross-entropy in nats over ids `[windows, length]`, in fp32. Leaves the model in evaluation mode."""
    model.eval()
    parts = [next_token_loss(model, part.to(model.device)).item() * len(part) for part in ids.split(rows)]
    return sum(parts) / len(ids)
