"""Early stopping: keep the weights that were best on held-out text, and stop when they have not been beaten for a while."""

import torch
from torch import nn

__all__ = ["Best"]


class Best:
    """The parameters that learn, as they were when the held-out loss was lowest.

    Args:
        patience: held-out losses in a row that may be no better; None: nothing is kept, and training goes on to its end.

    Attributes:
        loss: the lowest so far, in nats. waited: how many losses ago that was.
    """

    def __init__(self, model: nn.Module, patience: int | None) -> None:
        self.parameters = [one for one in model.parameters() if one.requires_grad]
        self.patience, self.loss, self.waited = patience, float("inf"), 0
        self._kept: list[torch.Tensor] = []

    def tell(self, loss: float) -> bool:
        """Take note of a held-out loss; returns whether to stop."""
        if self.patience is None:
            return False
        if loss < self.loss:
            self.loss, self.waited = loss, 0
            self._kept = [one.detach().clone() for one in self.parameters]
            return False
        self.waited += 1
        return self.waited > self.patience

    @torch.no_grad()
    def restore(self) -> None:
        """Put the best parameters back in place, if any were kept."""
        for parameter, kept in zip(self.parameters, self._kept):
            parameter.copy_(kept)
