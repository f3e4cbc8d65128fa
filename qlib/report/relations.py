"""How strategies hang together, told from their recipes alone: controls, what training began with, ablations."""

from collections import Counter
from dataclasses import asdict
from functools import lru_cache
from typing import Any

from qlib.options import options_of
from qlib.recipe import pass_names
from qlib.report.book import Book, Entry

__all__ = ["TRAINING", "recipe_of", "kinds", "is_control", "control_of", "untrained_of", "parts_of", "left_out", "wholes"]

TRAINING = "finetune"  # the pass that trains
Recipe = list[dict[str, Any]]


def recipe_of(entry: Entry) -> Recipe:
    """The passes with all their options: a record of an earlier version lacks those that came later."""
    kept = vars(entry)  # every table asks for it, many times over
    if "_recipe" not in kept:
        steps = [step for step in entry.params.get("recipe") or [] if isinstance(step, dict)]
        kept["_recipe"] = [_defaults(str(step.get("pass"))) | step for step in steps]
    return kept["_recipe"]


@lru_cache(maxsize=None)
def _defaults(name: str) -> dict[str, Any]:
    """The options that a pass has if none are given; none of a pass that is unknown."""
    module = pass_names().get(name)
    return asdict(options_of(module)[0]()) if module else {}


def _trains(step: dict[str, Any]) -> bool:
    return step.get("pass") == TRAINING


def _course(recipe: Recipe) -> Recipe:
    """The training passes, told apart by everything but the loss: a control has no teacher to learn from."""
    return [{key: value for key, value in step.items() if key != "loss"} for step in recipe if _trains(step)]


def kinds(entry: Entry) -> set[str]:
    """What is done to the model: ``prune``, ``quantize``, ``train``, ``transforms``: the folders of its passes."""
    folders = {name: module.split(".")[1] for name, module in pass_names().items()} | {TRAINING: "train"}
    return {folders[step["pass"]] for step in recipe_of(entry) if step.get("pass") in folders}


def is_control(entry: Entry) -> bool:
    """Whether the recipe trains and does nothing else: the uncompressed model, trained on."""
    return bool(recipe_of(entry)) and all(map(_trains, recipe_of(entry)))


def _peers(book: Book, entry: Entry) -> list[Entry]:
    """Measured strategies of the same model, device and seed."""

    def place(e: Entry) -> tuple:
        return e.model, e.device, e.params.get("seed")

    return [e for e in book.strategies if e is not entry and e.measurements and place(e) == place(entry)]


def control_of(book: Book, entry: Entry) -> Entry | None:
    """The uncompressed model after the very same training passes (their loss may differ), None if there is none."""
    course = _course(recipe_of(entry))
    if not course or is_control(entry):
        return None
    return next((e for e in _peers(book, entry) if is_control(e) and _course(recipe_of(e)) == course), None)


def untrained_of(book: Book, entry: Entry) -> Entry | None:
    """The same recipe without training; where that was not run, without its last training pass."""
    recipe = recipe_of(entry)
    trained = [at for at, step in enumerate(recipe) if _trains(step)]
    if not trained or is_control(entry):
        return None
    without = [step for step in recipe if not _trains(step)], recipe[: trained[-1]] + recipe[trained[-1] + 1 :]
    peers = _peers(book, entry)
    return next((e for wanted in without for e in peers if recipe_of(e) == wanted), None)


def left_out(entry: Entry, part: Entry) -> list[str] | None:
    """The passes of the entry's recipe that `part` leaves out, numbered where one occurs twice; None if it is no part."""
    rest, missing, seen = recipe_of(part), [], Counter()
    often = Counter(str(step.get("pass")) for step in recipe_of(entry))
    for step in recipe_of(entry):
        name = str(step.get("pass"))
        seen[name] += 1
        if rest and step == rest[0]:
            rest = rest[1:]
        else:
            missing.append(f"{name} ({seen[name]} of {often[name]})" if often[name] > 1 else name)
    return missing if missing and not rest and recipe_of(part) else None


def parts_of(book: Book, entry: Entry) -> list[Entry]:
    """The ablation: strategies that leave out one or more of the entry's passes, the fullest first."""
    parts = [e for e in _peers(book, entry) if left_out(entry, e)]
    return sorted(parts, key=lambda e: len(left_out(entry, e)))


def wholes(book: Book, entries: list[Entry]) -> list[Entry]:
    """Those of `entries` that are no part of another of them."""
    parts = {id(part) for entry in entries for part in parts_of(book, entry)}
    return [e for e in entries if id(e) not in parts]
