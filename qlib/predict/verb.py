"""The verb: predict one recipe on one model for one machine."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from qlib.errors import UserError, nearest
from qlib.params import Strategy, load_strategy
from qlib.params.strategy import Calibration
from qlib.paths import find_root
from qlib.predict.anatomy import empty_subject, read_anatomy
from qlib.predict.counts import Text, Unpredicted
from qlib.predict.experience import Experience, outcome_of, read_experience
from qlib.predict.machine import Machine, this_machine
from qlib.predict.memory import peak_terms
from qlib.predict.outcome import Outcome
from qlib.predict.passes import compress_columns
from qlib.predict.sizes import cache_bytes_per_token, disk_bytes, model_bytes
from qlib.predict.tokens import decode_columns, prefill_columns
from qlib.recipe import read_recipe
from qlib.refuse import check_recipe

__all__ = ["Estimate", "Prediction", "predict", "find_strategy", "PROMPT", "CONTEXT"]

PROMPT = CONTEXT = 256  # tokens, as in the speed records
EXACT, BOUND, FITTED, FLOOR = "exact", "at most", "predicted", "at full rate"


@dataclass(frozen=True)
class Estimate:
    """One predicted figure.

    Attributes:
        value: None where there is no prediction; `why` then says why not, and `low`, if there is one, what it cannot be below.
        low, high: of nine of ten runs that were held out, what was measured lay so far off; equal where it is exact.
        method: exact, at most, predicted, at full rate (of the hardware: nothing can be faster).
    """

    value: float | None
    unit: str
    low: float | None = None
    high: float | None = None
    method: str = ""
    why: str = ""


@dataclass(frozen=True)
class Prediction:
    """All figures of a recipe on a model.

    Attributes:
        figures: by name. fits: what is asked -> yes, no, or None where that is not known.
        terms: figure -> its memory by what it is for.
        machine, measured: which one, and when. learnt: what times were fitted to.
    """

    model: str
    recipe: str
    machine: str
    measured: str
    learnt: str
    figures: dict[str, Estimate]
    fits: dict[str, bool | None]
    terms: dict[str, dict[str, int]] = field(default_factory=dict)


def find_strategy(recipe: str, root: Path) -> Strategy:
    """A strategy by file or name.

    Raises:
        UserError: there is none; or what its file says is wrong.
    """
    known = {file.stem: file for file in (root / "params").glob("*.yaml")}
    file = Path(recipe) if Path(recipe).is_file() else known.get(recipe)
    if file is None:
        raise UserError(f"{recipe}: no such strategy file{nearest(Path(recipe).stem, known)}; see `qlib list`")
    return load_strategy(file, root)


def predict(
    model: str,
    recipe: str | Strategy | list[dict[str, Any]],
    machine: Machine | None = None,
    calibration: Calibration | None = None,
    root: Path | None = None,
    context: int = CONTEXT,
) -> Prediction:
    """Predict sizes, memory and times; nothing of the model but its configuration is read.

    Args:
        model: a name of `qlib.models.shapes`, a shipped model, a folder, or a hub id.
        recipe: a strategy, its name or its file, or passes as `qlib.compress` takes them.
        machine: None: this one, measured if need be (half a minute).
        calibration: None: that of the strategy.
        context: tokens before the one that is decoded, for which memory must have room, too.

    Raises:
        UserError: unknown model, recipe or option; a recipe that cannot work on the model.
    """
    root = root or find_root()
    strategy = find_strategy(recipe, root) if isinstance(recipe, str) else recipe
    passes = strategy if isinstance(strategy, list) else strategy.recipe
    calibration = calibration or (Calibration() if isinstance(strategy, list) else strategy.calibration)
    name = "recipe" if isinstance(strategy, list) else strategy.name
    anatomy = read_anatomy(model)
    steps = read_recipe(passes) if passes else []
    if steps:
        check_recipe(empty_subject(anatomy, model), steps)
    outcome = outcome_of(anatomy, passes)
    machine = machine or this_machine()
    learnt = read_experience(machine, root)
    text = Text(calibration.samples * calibration.length, calibration.length)
    figures, terms = _sizes(outcome, machine.device), {}
    for figure, streamed in (("compress_peak", False), ("stream_peak", True)):
        figures[figure], terms[figure] = _memory(figure, anatomy, steps, text, machine, learnt, streamed)
    tokens = {"decode_seconds": (decode_columns, context), "prefill_seconds": (prefill_columns, PROMPT)}
    for figure, (count, told) in tokens.items():
        figures[figure] = _time(figure, "tokens", partial(count, outcome, machine, told), learnt)
    told = partial(compress_columns, anatomy, steps, text, machine)
    figures["compress_seconds"] = _time("compress_seconds", "compress", told, learnt)
    outside = learnt.hidden[1] and not learnt.hidden[0] <= anatomy.config.hidden_size <= learnt.hidden[1]
    words = f"runs of {learnt.measured}, hidden sizes {learnt.hidden[0]} to {learnt.hidden[1]}" if learnt.measured else ""
    words += ", which this model lies outside of" if outside else ""
    return Prediction(model, name, machine.name, machine.measured, words, figures, _fits(figures, machine, context), terms)


def _sizes(outcome: Outcome, device: str) -> dict[str, Estimate]:
    cache = cache_bytes_per_token(outcome)
    figures = {"kv_bytes_per_token": Estimate(cache, "bytes", cache, cache, EXACT)}
    if outcome.unknown:
        return {name: Estimate(None, "bytes", why=outcome.unknown) for name in ("disk_bytes", "resident_bytes")} | figures
    disk, held = disk_bytes(outcome), model_bytes(outcome, device)
    on_disk = Estimate(disk, "bytes", disk, disk, EXACT)
    if outcome.bound:
        on_disk = Estimate(disk, "bytes", None, disk, BOUND, outcome.bound)
    return {"disk_bytes": on_disk, "resident_bytes": Estimate(held, "bytes", held, held, EXACT)} | figures


def _memory(
    figure: str, anatomy: Any, steps: list, text: Text, machine: Machine, learnt: Experience, streamed: bool
) -> tuple[Estimate, dict[str, int]]:
    if not steps:
        return Estimate(None, "bytes", why="the recipe is empty"), {}
    try:
        terms = peak_terms(anatomy, steps, text, machine.process_bytes, streamed)
    except Unpredicted as reason:
        return Estimate(None, "bytes", why=str(reason)), {}
    return _banded(sum(terms.values()), "bytes", learnt.band(figure)), terms


def _time(figure: str, fit: str, count: Callable[[], Any], learnt: Experience) -> Estimate:
    """A time from its counts; where nothing was fitted, the least it can be."""
    try:
        columns = count()
    except Unpredicted as reason:
        return Estimate(None, "seconds", why=str(reason))
    found = learnt.fits.get(fit)
    if found is not None and (seconds := found.seconds(columns)) is not None:
        return _banded(seconds, "seconds", learnt.band(figure))
    what = ", ".join(found.unknown(columns)) if found else "anything"
    floor = sum(seconds for name, seconds in columns.items() if name.endswith((": bytes", ": products")))
    least = floor if fit == "tokens" else None
    return Estimate(None, "seconds", least, None, FLOOR if least else "", f"no measured run on this machine has {what}")


def _banded(value: float, unit: str, band: float | None) -> Estimate:
    if band is None:
        return Estimate(value, unit, method=FITTED, why="no run was held out")
    return Estimate(value, unit, value * math.exp(-band), value * math.exp(band), FITTED)


def _fits(figures: dict[str, Estimate], machine: Machine, context: int) -> dict[str, bool | None]:
    """Whether memory and disk are large enough, by the upper end of each band."""
    resident, cache = figures["resident_bytes"].value, figures["kv_bytes_per_token"].value
    running = None if resident is None else resident + cache * (context + 1) + machine.process_bytes
    asked = {
        "compress in memory": (_upper(figures["compress_peak"]), machine.memory_bytes),
        "compress as a stream": (_upper(figures["stream_peak"]), machine.memory_bytes),
        f"run, with a context of {context}": (running, machine.memory_bytes),
        "on disk": (figures["disk_bytes"].value, machine.disk_bytes),
    }
    return {what: None if None in sides else sides[0] <= sides[1] for what, sides in asked.items()}


def _upper(estimate: Estimate) -> float | None:
    return estimate.value if estimate.high is None else estimate.high
