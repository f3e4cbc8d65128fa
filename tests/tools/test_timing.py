"""Rounds of a runtime: the context is filled again when it must be, and never while the clock runs."""

import torch

from qlib.tools.timing import LONGER, STEPS, Turns


class Counting:
    """A runtime that notes what it is asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def prefill(self, ids: torch.Tensor) -> None:
        assert int(ids.max()) < 7
        self.calls.append(("prefill", len(ids)))

    def decode(self, ids: torch.Tensor) -> None:
        self.calls.append(("decode", len(ids)))


def test_context_is_filled_anew_after_a_prefill_and_when_it_has_grown():
    runtime = Counting()
    turns = Turns(runtime, context=20, prompt=9, vocab=7)
    assert turns.decode() > 0 and turns.decode() > 0
    assert runtime.calls == [("prefill", 20)] + [("decode", 1)] * (1 + 2 * STEPS)
    turns.prefill()
    turns.decode()
    assert runtime.calls[-STEPS - 3 :][:2] == [("prefill", 9), ("prefill", 20)]
    runtime.calls.clear()
    for _ in range(LONGER // STEPS + 1):
        turns.decode()
    assert runtime.calls.count(("prefill", 20)) == 1
