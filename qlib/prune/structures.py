"""Remove whole groups of input channels of a linear and let the rest take over what they did: algebra on one matrix.

Everything follows from the Gram matrix H = X^T X of the linear's inputs `[tokens, in]`. With weights W `[out, in]` the
squared error of a change D of the weights is tr(D H D^T). A ridge keeps D small where the data say little:
H + damp * mean(diag H) * I takes the place of H. The least error that is left after channels P are removed is then
tr(W_P ([H^-1]_PP)^-1 W_P^T): the optimal brain surgeon (Hassibi and Stork 1993) for groups, as in ZipLM (Kurtic et al.
2023) and SlimGPT (Ling et al. 2024).
"""

import torch

__all__ = ["Gram", "ridge", "compensate", "output_error", "choose_structures", "channels_of"]


class Gram:
    """H = X^T X of a linear's inputs, accumulated in float64 over all calibration tokens."""

    def __init__(self, width: int) -> None:
        self.matrix = torch.zeros(width, width, dtype=torch.float64)

    def feed(self, inputs: torch.Tensor) -> None:
        """Add a batch `[tokens, in]`."""
        rows = inputs.float()
        self.matrix = self.matrix.to(inputs.device) + rows.T @ rows


def ridge(gram: torch.Tensor, damp: float) -> torch.Tensor:
    """H + damp * mean(diag H) * I, `[in, in]`; where nothing was ever fed, the identity."""
    strength = damp * gram.diagonal().mean()
    strength = torch.where(strength > 0, strength, torch.ones_like(strength))
    return gram + strength * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


def compensate(weight: torch.Tensor, gram: torch.Tensor, keep: torch.Tensor, damp: float) -> torch.Tensor:
    """The weights of the kept channels that best reproduce the output: W H[:, K] (H[K, K])^-1 with the ridge in H.

    With all channels kept this is W itself: the ridge holds on to the weights that were there, not to zero.

    Args:
        weight: `[out, in]`. gram: `[in, in]`, float64. keep: indices `[kept]`.

    Returns:
        `[out, kept]`, float64.
    """
    firm = ridge(gram, damp)[:, keep]  # [in, kept]
    target = weight.to(gram.dtype) @ firm
    return torch.cholesky_solve(target.T, torch.linalg.cholesky(firm[keep])).T


def output_error(weight: torch.Tensor, gram: torch.Tensor, keep: torch.Tensor, kept: torch.Tensor) -> float:
    """||X W^T - X_K W_K^T|| / ||X W^T|| with `kept` `[out, kept]` for the columns `keep`; 0 if X W^T is 0."""
    change = weight.to(gram.dtype).clone()
    before = ((change @ gram) * change).sum()
    change[:, keep] -= kept.to(gram.dtype)
    left = ((change @ gram) * change).sum().clamp(min=0)
    return (left / before).sqrt().item() if before > 0 else 0.0


def choose_structures(
    weight: torch.Tensor,
    gram: torch.Tensor,
    width: int,
    groups: list[int],
    quota: int,
    damp: float,
    compensated: bool = True,
    rounds: int | None = None,
) -> torch.Tensor:
    """Which structures stay: greedily, those go whose removal costs the output least.

    Args:
        weight: `[out, in]`. gram: `[in, in]`.
        width: adjacent channels of a structure: 1, or the width of a head.
        groups: to which group each structure belongs; of each, `quota` stay.
        compensated: what it costs after the others have taken over; otherwise what it costs as it is, ||W_S X_S||.
        rounds: after each, the costs are computed anew; None: one structure goes in a round.

    Returns:
        indices of the structures that stay, ascending.
    """
    count = len(groups)
    alive, sizes = torch.ones(count, dtype=torch.bool), {group: groups.count(group) for group in set(groups)}
    excess = sum(size - quota for size in sizes.values())
    if excess == 0:
        return torch.arange(count)
    rounds = min(rounds or excess, excess) if compensated else 1
    weight, inverse = weight.to(gram.dtype).clone(), torch.linalg.inv(ridge(gram, damp)) if compensated else gram
    for left in range(rounds, 0, -1):
        blocks = _blocks(inverse, width)  # [structures, width, width]
        cost = _costs(weight, torch.linalg.inv(blocks) if compensated else blocks)
        goes = []
        for structure in cost.masked_fill(~alive.to(cost.device), torch.inf).argsort().tolist():
            if len(goes) == -(-excess // left):
                break
            if sizes[groups[structure]] > quota and alive[structure]:
                goes.append(structure)
                sizes[groups[structure]] -= 1
        alive[goes] = False
        excess -= len(goes)
        if compensated and excess:
            _remove(weight, inverse, channels_of(torch.tensor(goes), width).to(weight.device))
    return alive.nonzero().flatten()


def channels_of(structures: torch.Tensor, width: int) -> torch.Tensor:
    """Indices of the channels of structures, ascending if these are."""
    return (structures[:, None] * width + torch.arange(width)).flatten()


def _blocks(matrix: torch.Tensor, width: int) -> torch.Tensor:
    """The blocks on the diagonal, `[structures, width, width]`."""
    count = len(matrix) // width
    return matrix.view(count, width, count, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _costs(weight: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """tr(W_S B_S W_S^T) of every structure S, `[structures]`."""
    parts = weight.view(len(weight), *blocks.shape[:2])  # [out, structures, width]
    return torch.einsum("osi,sij,osj->s", parts, blocks, parts)


def _remove(weight: torch.Tensor, inverse: torch.Tensor, gone: torch.Tensor) -> None:
    """Take channels out of W and H^-1, in place. Their rows become those of the identity, so that all stays regular."""
    factor = torch.linalg.solve(inverse[gone][:, gone], inverse[gone])  # [gone, in]
    weight -= weight[:, gone] @ factor
    inverse -= inverse[:, gone] @ factor
    weight[:, gone], inverse[gone], inverse[:, gone] = 0, 0, 0
    inverse[gone, gone] = 1
