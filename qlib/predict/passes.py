"""What each pass has to do, in the seconds it would take at the full rates of a machine.

Passes are found by name in `PASSES`; one that is not there is not predicted. A linear is `[out, in]`, W = out x in weights.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qlib.blockwise import Step, reads, wants_targets
from qlib.compress import WALKED, stages
from qlib.predict.anatomy import Anatomy
from qlib.predict.counts import PRODUCTS, Columns, Text, Unpredicted, attention_seconds, full_rate, kernel_of
from qlib.predict.machine import Machine
from qlib.predict.outcome import Outcome, after, start
from qlib.recipe import pass_name
from qlib.transforms.awq import CUTS, FEW_CUTS

__all__ = ["compress_columns", "PASSES", "Task"]


def compress_columns(anatomy: Anatomy, steps: list[Step], text: Text, machine: Machine) -> Columns:
    """A whole recipe, in memory, and a second of what is there once however little is done. Training does not count.

    Raises:
        Unpredicted: a pass that is not in `PASSES`.
    """
    found, outcome = Columns({"begin": 1.0}), start(anatomy)
    for group in stages(steps):
        now = outcome
        for module, options in group:
            if module.__name__.startswith("qlib.train."):
                outcome = after(outcome, module, options)
                continue
            if pass_name(module) not in PASSES:
                raise Unpredicted(f"pass {pass_name(module)} has no count of what it does")
            found += PASSES[pass_name(module)](Task(now.anatomy, options, text, machine))
            outcome = after(outcome, module, options)
        if group[0][0].SCOPE in WALKED:
            found += _walk(now, outcome, group, text, machine)
    return found


def _walk(before: Outcome, behind: Outcome, group: list[Step], text: Text, machine: Machine) -> Columns:
    """What a walk does for all of its passes: run blocks over the text, put results into their places."""
    found, anatomy = Columns(), before.anatomy
    for number in range(anatomy.layers):
        for name, held in behind.held[number].items():
            if held.grid and before.held[number][name].grid is None:
                weights = math.prod(anatomy.linears[name])
                found[f"pack {kernel_of(held, anatomy.linears[name])}"] += full_rate(machine, "elementwise", weights)
    if not any(reads(module, options) for module, options in group):
        return found
    feeds = sum(module.SCOPE == "block" for module, options in group if reads(module, options))
    linear = [options for module, options in group if module.SCOPE == "linear" and reads(module, options)]
    feeds += (len(anatomy.groups) if any(getattr(one, "true_sequential", False) for one in linear) else 1) if linear else 0
    runs = anatomy.layers * (feeds + wants_targets(group))
    found += _forward(anatomy, text, machine, runs, "bf16")
    kernel = kernel_of(behind.held[0]["mlp.up_proj"], anatomy.linears["mlp.up_proj"])
    return found + _forward(anatomy, text, machine, anatomy.layers - 1, PRODUCTS.get(kernel, "bf16"))


def _forward(anatomy: Anatomy, text: Text, machine: Machine, runs: int, kind: str) -> Columns:
    """`runs` blocks over all of the text."""
    hidden, ffn = anatomy.linears["mlp.down_proj"]
    products = 2.0 * text.tokens * anatomy.linear_weights
    kind = kind if kind in machine.rates else "bf16"
    return Columns({
        f"walk {kind}: products": runs * full_rate(machine, kind, products, hidden),
        "walk: attention": runs * attention_seconds(anatomy, machine, text.tokens, text.length),
        "walk: numbers": runs * full_rate(machine, "elementwise", text.tokens * (8.0 * hidden + 3.0 * ffn)),
    })  # fmt: skip


@dataclass(frozen=True)
class Task:
    """What one pass is told, for its count."""

    anatomy: Anatomy
    options: Any
    text: Text
    machine: Machine

    @property
    def weights(self) -> float:
        """Of all linears."""
        return float(self.anatomy.layers * self.anatomy.linear_weights)

    @property
    def inputs(self) -> list[int]:
        """Width of the inputs of each group of linears."""
        return [self.anatomy.linears[names[0]][1] for names in self.anatomy.groups]

    def numbers(self, count: float) -> float:
        return full_rate(self.machine, "elementwise", count)

    def products(self, kind: str, counts: list[tuple[float, int]]) -> float:
        """Seconds of one product for each of (FLOP, width), in every block."""
        return self.anatomy.layers * sum(full_rate(self.machine, kind, count, size) for count, size in counts)


def _hessians(task: Task) -> Columns:
    """Sums of x x^T, half of them, and their factors: t in^2 and in^3 / 3."""
    tokens = float(task.text.tokens)
    return Columns({
        "Hessian": task.products("hessian", [(tokens * width**2, width) for width in task.inputs]),
        "factor": task.products("factor", [(width**3 / 3, width) for width in task.inputs]),
    })  # fmt: skip


def _columns(name: str) -> Callable[[Task], Columns]:
    """Passes that go from column to column: every error is handed on to all later columns, W in FLOP."""

    def count(task: Task) -> Columns:
        linears = task.anatomy.linears.values()
        handed = task.products("fp32", [(float(rows * width**2), width) for rows, width in linears])
        return _hessians(task) + Columns({f"{name}: handed on": handed, f"{name}: columns": task.numbers(task.weights)})

    return count


def _rounding(name: str, times: Callable[[Any], float] = lambda options: 1.0) -> Callable[[Task], Columns]:
    """Passes that look at every weight, some of them several times."""
    return lambda task: Columns({f"{name}: weights": task.numbers(task.weights * times(task.options))})


def _rtn(task: Task) -> Columns:
    clip = task.options.clip
    return Columns({"rtn: weights" if clip == "none" else "rtn: clip": task.numbers(task.weights)}) + (
        _squares(task) if clip == "activations" else Columns()
    )


def _squares(task: Task) -> Columns:
    return Columns({"squares of inputs": task.anatomy.layers * task.numbers(float(task.text.tokens) * sum(task.inputs))})


def _wanda(task: Task) -> Columns:
    return _squares(task) + Columns({"wanda: weights": task.numbers(task.weights)})


def _awq(task: Task) -> Columns:
    """Gram matrices; then for each scale that is tried ranges are cut and the error of the outputs computed."""
    options, tokens = task.options, float(task.text.tokens)
    tried = options.steps * (2 if options.weights else 1)
    linears = task.anatomy.linears.values()
    return Columns({
        "awq: gram": task.products("fp32", [(2 * tokens * width**2, width) for width in task.inputs]),
        "awq: errors": task.products("fp32", [(2.0 * tried * rows * width**2, width) for rows, width in linears]),
        "awq: cuts" if options.clip else "awq: scales": task.numbers((tried * len(FEW_CUTS) + len(CUTS)) * task.weights),
    })  # fmt: skip


def _signround(task: Task) -> Columns:
    """Steps of training: forwards and backwards on a few windows, and every weight rounded and moved."""
    options = task.options
    tokens = float(options.iterations * options.batch * task.text.length)
    products = 6 * tokens * task.weights
    return Columns({
        "signround: products": full_rate(task.machine, "bf16", products, task.anatomy.config.hidden_size),
        "signround: weights": task.numbers(options.iterations * task.weights),
    })  # fmt: skip


def _nothing(task: Task) -> Columns:
    return Columns()


def _ends(task: Task) -> Columns:
    sizes = [math.prod(shape) for shape in task.anatomy.outer.values() if len(shape) == 2]
    return Columns({"ends: weights": task.numbers(float(sum(sizes)))})


#: Name of a pass -> what it does beyond what a walk does for all.
PASSES: dict[str, Callable[[Task], Columns]] = {
    "rtn": _rtn, "gptq": _columns("gptq"), "sparsegpt": _columns("sparsegpt"), "joint": _columns("joint"),
    "hqq": _rounding("hqq", lambda options: options.iterations + 1), "magnitude": _rounding("magnitude"), "wanda": _wanda,
    "awq": _awq, "smooth": _squares, "signround": _signround, "ends": _ends, "kv_cache": _nothing, "keep_ends": _nothing,
}  # fmt: skip
