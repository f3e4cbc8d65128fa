"""The cheapest choice of a width for every linear under a budget of bits: a knapsack with one choice per linear, solved
exactly (Sinha and Zoltners 1979)."""

from typing import Sequence

import numpy as np

from qlib.errors import UserError

__all__ = ["allocate"]


def allocate(costs: np.ndarray, sizes: Sequence[int], bits: Sequence[int], budget: float) -> list[int]:
    """Choose a width for every linear so that the summed cost is least and the average width at most `budget`.

    Exact up to rounding of floats. Partial choices (bits used, cost) are extended linear by linear; one that another
    beats in both is dropped, and so is one that cannot end below the best known choice: the Lagrangian relaxation
    says how little the remaining linears can cost at best (Nemhauser and Ullmann 1969; Fisher 1981).

    Args:
        costs: `[linears, widths]`, e.g. nats. sizes: weights of each linear. bits: the widths.
        budget: average bits of a weight.

    Raises:
        UserError: the budget is below the least width, or above the greatest.
    """
    if not min(bits) <= budget <= max(bits):
        raise UserError(f"budget: {budget:g} is not allowed; allowed: {min(bits)} to {max(bits)} bits")
    costs, widths = np.asarray(costs, dtype=np.float64), np.asarray(bits, dtype=np.int64)
    needs = np.asarray(sizes, dtype=np.int64)[:, None] * widths  # bits of each linear at each width
    limit = int(np.floor(budget * np.sum(sizes) * (1 + 1e-12)))
    price, best = _price(costs, needs, limit)
    priced = (costs + price * needs).min(1)
    rest, least = (np.append(np.cumsum(x[::-1])[::-1][1:], 0) for x in (priced, needs.min(1)))
    slack = 1e-9 * (abs(best) + np.abs(costs).max() * 1e-3) + price * limit * 1e-12
    used, spent, steps = np.zeros(1, dtype=np.int64), np.zeros(1), []
    for index in range(len(costs)):
        total = (used[:, None] + needs[index]).ravel()  # [states * widths]
        cost = (spent[:, None] + costs[index]).ravel()
        held = np.flatnonzero(
            (total + least[index] <= limit) & (cost + rest[index] + price * (total - limit) <= best + slack)
        )
        order = held[np.lexsort((cost[held], total[held]))]
        lowest = np.minimum.accumulate(cost[order])
        order = order[np.append(True, cost[order][1:] < lowest[:-1])]
        used, spent = total[order], cost[order]
        steps.append(np.divmod(order, len(widths)))
    state, chosen = int(np.argmin(spent)), []
    for parents, picks in reversed(steps):
        chosen.append(int(widths[picks[state]]))
        state = int(parents[state])
    return chosen[::-1]


def _price(costs: np.ndarray, needs: np.ndarray, limit: int) -> tuple[float, float]:
    """Price of a bit at which everyone's best choice just fits the limit, and what these choices cost."""

    def choose(price: float) -> tuple[int, float]:
        # among equals the smaller width, so that a high price always fits
        order = np.argsort(needs, axis=1, kind="stable")
        priced = np.take_along_axis(costs + price * needs, order, 1)
        pick = np.take_along_axis(order, priced.argmin(1)[:, None], 1)
        return int(np.take_along_axis(needs, pick, 1).sum()), float(np.take_along_axis(costs, pick, 1).sum())

    used, cost = choose(0.0)
    if used <= limit:
        return 0.0, cost
    low, high = 0.0, (np.ptp(costs) + 1e-300) / max(int(np.diff(np.unique(needs)).min(initial=1)), 1) * 2
    best = choose(high)[1]
    for _ in range(200):
        middle = (low + high) / 2
        used, cost = choose(middle)
        if used <= limit:
            high, best = middle, min(best, cost)
        else:
            low = middle
    return high, best
