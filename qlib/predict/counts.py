"""What predictions of time count with: seconds at the full rate of a machine, by column of the fit (`qlib.predict.fit`)."""

from collections import Counter
from dataclasses import dataclass

from qlib.layers.packing import layer_class
from qlib.predict.anatomy import Anatomy
from qlib.predict.machine import Machine
from qlib.predict.outcome import Held

__all__ = ["Columns", "Text", "Unpredicted", "PRODUCTS", "kernel_of", "full_rate", "attention_seconds"]

Columns = Counter  # name of a column -> seconds at full rate
#: Rate at which many rows are multiplied with a packed weight.
PRODUCTS = {"Int4Linear": "int4", "Int8Linear": "int8", "Int8DynamicLinear": "int8-a8"}
#: Layers that run as fast, for each byte they hold and each product, as another kind whose rates are known.
LIKE = {"Int2Linear": "Int4Linear"}


class Unpredicted(Exception):
    """Says in a few words why there is no prediction."""


@dataclass(frozen=True)
class Text:
    """Calibration text: `tokens` in windows of `length`, `rows` windows in a batch."""

    tokens: int
    length: int
    rows: int = 16

    @property
    def batch(self) -> int:
        """Tokens of a batch."""
        return min(self.tokens, self.rows * self.length)


def kernel_of(held: Held, shape: tuple[int, int]) -> str:
    """What multiplies with a linear that is held so: the class of its packed layer, or bf16."""
    name = "bf16" if held.grid is None else layer_class(held.grid, *shape).__name__
    return LIKE.get(name, name)


def full_rate(machine: Machine, kind: str, count: float, size: float = 0) -> float:
    """Seconds of so much work of a kind.

    Raises:
        Unpredicted: the machine's rate of it is not known.
    """
    rate = machine.rate(kind, size)
    if rate is None:
        raise Unpredicted(f"the machine's rate of {kind} is not known")
    return count / rate


def attention_seconds(anatomy: Anatomy, machine: Machine, tokens: int, length: int) -> float:
    """Products of queries with keys, and of weights with values, each query with half of the keys."""
    width = anatomy.linears["self_attn.q_proj"][0]
    return full_rate(machine, "bf16", 2.0 * tokens * length * width, anatomy.head_dim)
