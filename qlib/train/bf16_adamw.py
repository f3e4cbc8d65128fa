"""AdamW for weights that are bf16 themselves: what becomes of updates that are smaller than a step of the format.

A bf16 number has 8 binary digits. An update below a 512th of its weight is lost when the sum is rounded to nearest, and late in
training most updates are. Two ways keep them: Kahan's compensation remembers what rounding lost, in a second bf16 number, and
adds it to the next update; stochastic rounding goes up or down with the probability that makes the sum right on average
(Zamirai et al. 2020, arXiv:2010.06192, who find that either is enough).
"""

from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import torch

__all__ = ["Bf16AdamW", "Rounding", "round_stochastically"]

Rounding = Literal["nearest", "kahan", "stochastic"]


def round_stochastically(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """fp32 to bf16: up with the share of the step that the number is above its lower neighbour, else down.

    bf16 is the upper half of fp32, so a random number below 2^16 is added to the lower half, and that is cut off.
    """
    noise = torch.randint(0, 2**16, values.shape, generator=generator, dtype=torch.int32, device=values.device)
    return (values.view(torch.int32) + noise).bitwise_and_(-(2**16)).view(torch.float32).bfloat16()


class Bf16AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2017) on bf16 parameters, with bf16 moments; each update is computed in fp32.

    Args:
        rounding: how a weight and its update become a bf16 weight.
        seed: of stochastic rounding; the same seed rounds alike.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rounding: Rounding = "nearest",
        seed: int = 0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.rounding, self.seed = rounding, seed
        self.generator = torch.Generator(self.param_groups[0]["params"][0].device)
        #: Of the last step: updates that were not 0, and those of them that left their weight as it was.
        self.updates = self.lost = 0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient."""
        self.updates = self.lost = 0
        parameters = [(one, group) for group in self.param_groups for one in group["params"] if one.grad is not None]
        for index, (parameter, group) in enumerate(parameters):
            change = self._update(parameter, group)
            # By the number of the step and nothing else that happened, so that a resumed run rounds alike.
            key = np.random.SeedSequence([self.seed, int(self.state[parameter]["step"]), index])
            self.generator.manual_seed(int(key.generate_state(1)[0]))
            self._put(parameter, change)

    def _update(self, parameter: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        """What the weight should change by, fp32."""
        state, gradient = self.state[parameter], parameter.grad.float()
        if not state:
            state["step"] = torch.zeros(())  # a tensor, as torch's own optimizers have it: checkpoints hold tensors
            state |= {"mean": torch.zeros_like(parameter), "square": torch.zeros_like(parameter)}
        state["step"] += 1
        (first, second), step = group["betas"], int(state["step"])
        mean = state["mean"].float().lerp_(gradient, 1 - first)
        square = state["square"].float().mul_(second).addcmul_(gradient, gradient, value=1 - second)
        state["mean"].copy_(mean)
        state["square"].copy_(square)
        root = (square / (1 - second**step)).sqrt_().add_(group["eps"])
        change = mean.div_(root).mul_(-group["lr"] / (1 - first**step))
        return change.sub_(parameter.float(), alpha=group["lr"] * group["weight_decay"])

    def _put(self, parameter: torch.Tensor, change: torch.Tensor) -> None:
        """Add `change`, fp32, to the bf16 parameter in place."""
        before = parameter.float()
        if self.rounding == "kahan":
            owed = self.state[parameter].setdefault("owed", torch.zeros_like(parameter))
            change = change + owed.float()
            after = (before + change).bfloat16()
            owed.copy_(change - (after.float() - before))
        elif self.rounding == "stochastic":
            after = round_stochastically(before + change, self.generator)
        else:
            after = (before + change).bfloat16()
        moves = change != 0
        self.updates += int(moves.sum())
        self.lost += int((moves & (after == parameter)).sum())
        parameter.copy_(after)
