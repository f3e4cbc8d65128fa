"""Runs that were measured on this machine, as `qlib bench --only predict` left them: what predictions are fitted to."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlib.models.shapes import Shape
from qlib.predict.anatomy import Anatomy, read_anatomy
from qlib.predict.counts import Text, Unpredicted
from qlib.predict.fit import Fit, Run, fit_runs, held_out, spread
from qlib.predict.machine import Machine, read_machine
from qlib.predict.memory import peak_terms
from qlib.predict.outcome import Outcome, after, start
from qlib.predict.passes import compress_columns
from qlib.predict.tokens import decode_columns, prefill_columns
from qlib.recipe import read_recipe

__all__ = ["Experience", "read_experience", "learn", "figures_of", "outcome_of", "RUNS"]

#: Where the benchmark leaves its runs, from the root of the project.
RUNS = Path("reports") / "predict.json"
#: Figure -> which runs are fitted together; all kinds of reading and multiplying are.
FITS = {"decode_seconds": "tokens", "prefill_seconds": "tokens", "compress_seconds": "compress"}


@dataclass(frozen=True)
class Experience:
    """What was learnt from runs.

    Attributes:
        fits: "tokens", "compress" -> factors. pairs: figure -> (name, measured, predicted while it was held out).
        hidden: least and largest hidden size of the shapes that were run.
        measured: when the runs' machine was measured; empty: there are no runs.
    """

    fits: dict[str, Fit] = field(default_factory=dict)
    pairs: dict[str, list[tuple[str, float, float]]] = field(default_factory=dict)
    hidden: tuple[int, int] = (0, 0)
    measured: str = ""

    def band(self, figure: str) -> float | None:
        """How far, as |log|, predictions of a figure lie off; None if none was held out."""
        return spread([(measured, predicted) for _, measured, predicted in self.pairs.get(figure, [])])


def outcome_of(anatomy: Anatomy, recipe: list[dict[str, Any]]) -> Outcome:
    """What a recipe leaves of a model; an empty one the model."""
    outcome = start(anatomy)
    for module, options in read_recipe(recipe) if recipe else []:
        outcome = after(outcome, module, options)
    return outcome


def figures_of(run: dict[str, Any], machine: Machine) -> dict[str, tuple[Any, float]]:
    """Figure -> what it is predicted from (columns, or bytes that need no fit), and what was measured.

    Figures of a pass or a kernel that is not counted are left out.
    """
    anatomy = read_anatomy(Shape(**run["shape"]))
    outcome, found = outcome_of(anatomy, run["recipe"]), {}
    text = Text(run.get("tokens") or 0, run.get("length") or 1)
    steps = read_recipe(run["recipe"]) if run["recipe"] else []
    counts: dict[str, Callable[[], Any]] = {
        "decode_seconds": lambda: decode_columns(outcome, machine, run["context"]),
        "prefill_seconds": lambda: prefill_columns(outcome, machine, run["prompt"]),
        "compress_seconds": lambda: compress_columns(anatomy, steps, text, machine),
        "compress_peak": lambda: sum(peak_terms(anatomy, steps, text, machine.process_bytes).values()),
        "stream_peak": lambda: sum(peak_terms(anatomy, steps, text, machine.process_bytes, streamed=True).values()),
    }
    for figure, value in run["measured"].items():
        with suppress(Unpredicted):
            if figure in counts:
                found[figure] = (counts[figure](), value)
    return found


def learn(machine: Machine, runs: Sequence[dict[str, Any]]) -> Experience:
    """Fit what runs on a machine took, and predict each shape from all others."""
    timed: dict[str, list[Run]] = {}
    pairs: dict[str, list[tuple[str, float, float]]] = {}
    for run in runs:
        for figure, (counts, measured) in figures_of(run, machine).items():
            if figure in FITS:
                one = Run(f"{run['name']} {figure}", run["shape"]["name"], counts, measured)
                timed.setdefault(FITS[figure], []).append(one)
            else:
                pairs.setdefault(figure, []).append((run["name"], measured, counts))
    for group in timed.values():
        for run, predicted in held_out(group):
            name, figure = run.name.rsplit(" ", 1)
            pairs.setdefault(figure, []).append((name, run.seconds, predicted))
    sizes = [run["shape"]["hidden"] for run in runs] or [0]
    fits = {name: fit_runs(group) for name, group in timed.items()}
    return Experience(fits, pairs, (min(sizes), max(sizes)), machine.measured if runs else "")


def read_experience(machine: Machine, root: Path) -> Experience:
    """What was learnt on the machine: from its own runs, else from those of `RUNS` if that is the same kind of machine."""
    if machine.runs:
        return learn(machine, machine.runs)
    file = root / RUNS
    if not file.is_file():
        return Experience()
    taught = read_machine(str(file))
    same = (taught.name, taught.threads, taught.device) == (machine.name, machine.threads, machine.device)
    return learn(taught, taught.runs) if same else Experience()
