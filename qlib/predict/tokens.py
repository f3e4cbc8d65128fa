"""What a token, and a prompt, has to do: bytes that are read, products, and calls, by the kernel of each linear."""

import math

from qlib.evaluate.footprint import BF16
from qlib.predict.anatomy import Anatomy
from qlib.predict.counts import PRODUCTS, Columns, Unpredicted, attention_seconds, full_rate, kernel_of
from qlib.predict.machine import Machine
from qlib.predict.outcome import Held, Outcome
from qlib.predict.sizes import held_bytes
from qlib.quantize.ends import GRID

__all__ = ["decode_columns", "prefill_columns"]


def decode_columns(outcome: Outcome, machine: Machine, context: int) -> Columns:
    """One token behind `context` others: all bytes are read once, by kernel; calls take time of their own.

    Raises:
        Unpredicted: something of which no time was ever measured.
    """
    _refuse(outcome)
    found, anatomy = Columns(), outcome.anatomy
    for block in outcome.held:
        for name, held in block.items():
            kernel = kernel_of(held, anatomy.linears[name])
            found[f"decode {kernel}: bytes"] += full_rate(machine, "read", held_bytes(held, anatomy.linears[name], machine.device))
            found[f"decode {kernel}: calls"] += 1 / (machine.rate("calls") or 1.0)
    found["decode bf16: bytes"] += full_rate(machine, "read", _cached(anatomy, context) + _small(anatomy))
    return found + _head(outcome, machine)


def prefill_columns(outcome: Outcome, machine: Machine, tokens: int) -> Columns:
    """A prompt of so many tokens; logits of the last one alone.

    Raises:
        Unpredicted: as `decode_columns`.
    """
    _refuse(outcome)
    found, anatomy = Columns(), outcome.anatomy
    for block in outcome.held:
        for name, held in block.items():
            shape = anatomy.linears[name]
            kernel = kernel_of(held, shape)
            kind = "bf16" if kernel == "bf16" else PRODUCTS.get(kernel)
            if kind is None:
                raise Unpredicted(f"no rate is measured for the products of {kernel}")
            kind = kind if kind in machine.rates else "bf16"
            found[f"prefill {kernel}: products"] += full_rate(machine, kind, 2.0 * tokens * math.prod(shape), min(shape))
            found[f"prefill {kernel}: calls"] += 1 / (machine.rate("calls") or 1.0)
    found["prefill: attention"] = attention_seconds(anatomy, machine, tokens, tokens) * anatomy.layers
    return found + _head(outcome, machine)


def _cached(anatomy: Anatomy, context: int) -> int:
    return BF16 * anatomy.layers * 2 * anatomy.kv_heads * anatomy.head_dim * (context + 1)


def _small(anatomy: Anatomy) -> int:
    return BF16 * anatomy.layers * sum(math.prod(shape) for shape in anatomy.block.values() if len(shape) == 1)


def _head(outcome: Outcome, machine: Machine) -> Columns:
    """Final norm and head of one token."""
    shape = (outcome.anatomy.config.vocab_size, outcome.anatomy.config.hidden_size)
    held = Held(GRID) if "head" in outcome.ends else Held()
    return Columns({f"decode {kernel_of(held, shape)}: bytes": full_rate(machine, "read", held_bytes(held, shape))})


def _refuse(outcome: Outcome) -> None:
    """What was never timed.

    Raises:
        Unpredicted: says what.
    """
    if outcome.unknown:
        raise Unpredicted(outcome.unknown)
    if outcome.cache:
        raise Unpredicted("a key-value cache of codes is not timed")
    if any(one.rank for block in outcome.held for one in block.values()):
        raise Unpredicted("adapters beside codes are not timed")
