"""Tables about training: what it recovers and against which control, in which precision, and what each pass gives."""

from dataclasses import dataclass

import numpy as np

from qlib.report.book import Book, Entry
from qlib.report.html import Cell, Column, Table
from qlib.report.pairs import Sample, interval_of, sign, together
from qlib.report.relations import control_of, is_control, kinds, left_out, parts_of, untrained_of, wholes
from qlib.report.show import table

__all__ = ["Recovery", "recoveries", "recovery_table", "precision_table", "ablations", "ablation_table"]

NOTHING_LOST = "nothing measurable was lost"
REFERENCE = Cell("reference", kind="absent")


@dataclass(frozen=True)
class Recovery:
    """What training gave back to one strategy.

    Attributes:
        before, baseline, control: what it is held against; None where there is no such strategy.
        shares: (figure, target) -> recovered share, a text where nothing was lost, None where it is not measured;
            the figures are ``nats`` and ``accuracy``, the targets ``baseline`` and ``control``.
    """

    entry: Entry
    before: Entry | None
    baseline: Entry | None
    control: Entry | None
    shares: dict[tuple[str, str], dict | str | None]


def recoveries(book: Book, model: str | None = None) -> list[Recovery]:
    """Every strategy that was trained and is no control."""
    trained = [e for e in book.of(model) if e.measurements and "train" in kinds(e) and not is_control(e)]
    return [_recovery(book, entry) for entry in trained]


def _recovery(book: Book, entry: Entry) -> Recovery:
    before, baseline, control = untrained_of(book, entry), book.baseline(entry), control_of(book, entry)
    shares = {}
    for figure in ("nats", "accuracy"):
        for name, target in (("baseline", baseline), ("control", control)):
            samples = together([baseline, target, before, entry])
            shares[figure, name] = samples and _share(samples[1:], figure)
    return Recovery(entry, before, baseline, control, shares)


def _share(samples: list[Sample], figure: str) -> dict | str | None:
    """(before - after) / (before - target), where before and target differ measurably."""
    target, before, after = (getattr(sample, figure) for sample in samples)
    documents = samples[0].documents
    worse = 1 if figure == "nats" else -1
    if sign(interval_of(before - target, "", documents)) != worse:
        return NOTHING_LOST
    with np.errstate(divide="ignore", invalid="ignore"):
        return interval_of((before - after) / (before - target), "fraction", documents)


def recovery_table(book: Book, model: str | None = None) -> Table:
    """The share of the loss that training gave back, and before and after beside the baseline and the control."""
    columns, rows = [Column("Strategy")], []
    for group in ("Recovered log-perplexity", "Recovered accuracy"):
        columns += [Column(f"Of the {target}", "", group) for target in ("baseline", "control")]
    for group in ("Perplexity", "Accuracy"):
        columns += [Column(title, "", group) for title in ("Before", "After", "Baseline", "Control")]
    for found in recoveries(book, model):
        shares = [Cell(share, kind="words") if isinstance(share, str) else share for share in found.shares.values()]
        stages = (found.before, found.entry, found.baseline, found.control)
        measures = [e and e.measure(name) for name in ("quality.perplexity", "quality.accuracy") for e in stages]
        start = f"from {found.before.name}" if found.before else ""
        rows.append([Cell(found.entry.name, (start,)), *shares, *measures])
    caption = (
        "What training gives back. Before is the same recipe without training; the control is the uncompressed model "
        "trained with the same tokens, schedule and seed. Recovered share = (before − after) / (before − target), of "
        "the logarithm of perplexity and of accuracy; the target is the baseline or the control. Small print: 95 % "
        "intervals; those of the shares are paired, drawn over documents."
    )
    return table(columns, rows, caption, "recovery")


def precision_table(entry: Entry | None) -> Table:
    """One training run in several number formats, side by side."""
    names = {
        "train.seconds": "Time to train",
        "train.tokens_per_second": "Tokens per second",
        "train.peak_rss_bytes": "Peak memory",
        "train.loss_difference": "Loss minus fp32, same step",
        "quality.perplexity": "Perplexity",
        "quality.perplexity_ratio": "Perplexity ratio to fp32, paired",
    }
    compared = ("train.loss_difference", "quality.perplexity_ratio")
    rows = []
    for format, measures in ((entry.record.get("formats") or {}) if entry else {}).items():
        cells = [REFERENCE if format == "fp32" and name in compared else measures.get(name) for name in names]
        rows.append([format, *cells])
    where = f" on {entry.device}" if entry else ""
    protocol = f" {entry.record['protocol']}." if entry and entry.record.get("protocol") else ""
    caption = (
        f"The same training{where} in several precisions, each compared with the fp32 run of the same seed. What was too "
        f"slow to run to its end has no quality.{protocol}"
    )
    return table(["Precision", *names.values()], rows, caption, "precision")


@dataclass(frozen=True)
class Part:
    """A recipe with passes left out, compared with the whole one.

    Attributes:
        missing: what is left out, in words; empty for the whole recipe.
        ratio: perplexity over that of the whole recipe, paired.
        points: accuracy minus that of the whole recipe, paired.
    """

    entry: Entry
    missing: str
    ratio: dict | None = None
    points: dict | None = None


def ablations(book: Book, model: str | None = None) -> list[list[Part]]:
    """Per combined recipe: itself, then all that leave passes out, the fullest first."""
    combined = [e for e in book.of(model, "combined") if e.measurements]
    return [_parts(book, whole) for whole in wholes(book, combined) if parts_of(book, whole)]


def _parts(book: Book, whole: Entry) -> list[Part]:
    parts = [Part(whole, "")]
    for entry in parts_of(book, whole):
        ratio = points = None
        if samples := together([book.baseline(whole), whole, entry]):
            _, full, less = samples
            ratio = interval_of(np.exp(less.nats - full.nats), "ratio", full.documents)
            points = interval_of(less.accuracy - full.accuracy, "points", full.documents)
        parts.append(Part(entry, ", ".join(left_out(whole, entry) or []), ratio, points))
    return parts


def ablation_table(book: Book, model: str | None = None) -> Table:
    """What each pass of the combined recipe gives: the recipe with passes left out."""
    columns: list[str | Column] = ["Strategy", "Left out", "On disk", "Perplexity", "Accuracy"]
    columns += [Column(title, "", "Against the whole, paired") for title in ("Perplexity ratio", "Accuracy change")]
    rows = []
    for part in (part for group in ablations(book, model) for part in group):
        own = [part.entry.measure(name) for name in ("size.disk_bytes", "quality.perplexity", "quality.accuracy")]
        change = [part.ratio, part.points] if part.missing else [REFERENCE] * 2
        rows.append([part.entry.name, part.missing or "nothing", *own, *change])
    caption = (
        "The combined recipe and what is left of it without some of its passes. A ratio above 1 or a change below 0 "
        "says what the missing passes were good for. Small print: 95 % intervals, drawn over documents."
    )
    return table(columns, rows, caption, "ablation")
