"""The league of tools: at each width every tool's strategies and our best recipe, ties told by paired intervals."""

from dataclasses import dataclass
from typing import Any, Sequence

import numpy as np

from qlib.report import numbers
from qlib.report.book import Book, Entry
from qlib.report.html import Cell, Column, Group, Table, measured
from qlib.report.measures import MEASURES
from qlib.report.pairs import interval_of, sign, together
from qlib.tools.about import about, tool_names

__all__ = ["OURS", "SAME", "Standing", "beside", "league_table", "league_words", "standings", "timed", "told"]

#: What stands for us at a width, from few bits per weight to many. The first ones were named before anything was measured on
#: the evaluation texts. The second ones came after tools that take most of a bit more were seen to lose less; their budgets
#: follow from the sizes of llama.cpp's Q3_K_M and Q2_K alone, their passes from the first ones.
OURS = {8: ("rtn-int8",), 4: ("best-int4",), 3: ("best-int3", "best-3.7-bits"), 2: ("best-int2", "best-2.8-bits")}
SAME = 4 / 128  # bits per weight that do not count: a zero of four bits in a group of 128, which symmetric codes have not
PHASES = {"decode": "Decode speed-up", "prefill": "Prefill speed-up"}
BESIDE = {
    "Bits per weight": "size.bits_per_weight",
    "Perplexity": "quality.perplexity",
    "Accuracy change, paired": "quality.accuracy_delta",
    "KL divergence": "quality.kl",
}
EQUAL = 0.1  # bits per weight within which two strategies are of the same size


@dataclass(frozen=True)
class Standing:
    """A strategy in the league of its width.

    Attributes:
        place: 1 for the lowest perplexity; None where it was not measured.
        tied: not measurably different from the first of its width.
        ratio: its perplexity over that of `rival`, paired.
        rival: our recipe that it is held against, see `beside`; None of ours, and where ours was not run.
    """

    entry: Entry
    place: int | None
    tied: bool
    ratio: dict | None
    rival: Entry | None = None

    @property
    def ours(self) -> bool:
        return self.entry.family != "tool"


def told(entry: Entry) -> dict[str, Any]:
    """What a tool's record says of the tool; of ours, or of a failure, what its parameters say."""
    found = (entry.record.get("details") or {}).get("tool") or {}
    asked = next((step for step in entry.params.get("recipe") or [] if step.get("pass") == "tool"), {})
    return {"name": asked.get("name", "ours"), "asked": asked} | found


def bits_of(entry: Entry) -> int | None:
    """Bits of a code, as the recipe of a tool asks for them."""
    return told(entry)["asked"].get("bits")


def standings(book: Book, model: str | None = None) -> dict[int, list[Standing]]:
    """Width -> its strategies, the best first; those that were not measured at the end. A book keeps them."""
    kept = vars(book).setdefault("_standings", {})  # resampling documents takes a while, and every table asks
    if model not in kept:
        kept[model] = _standings(book, model)
    return kept[model]


def _standings(book: Book, model: str | None) -> dict[int, list[Standing]]:
    found: dict[int, list[Standing]] = {}
    entries = book.of(model, "tool")
    for bits in sorted({bits_of(entry) for entry in entries} - {None}, reverse=True):
        ours = [e for name in OURS.get(bits, ()) for e in book.of(model) if e.name == name and e.measurements]
        members = [e for e in entries if bits_of(e) == bits] + ours
        members.sort(key=lambda e: numbers.number(e.measure("quality.perplexity")) or np.inf)
        found[bits] = [_standing(book, e, at, members[0], ours) for at, e in enumerate(members, 1)]
    return found


def beside(ours: Sequence[Entry], entry: Entry) -> Entry | None:
    """Of our recipes of a width, from few bits to many, the last that takes no more bits per weight; else the first."""
    size = numbers.number(entry.measure("size.bits_per_weight")) or np.inf
    fits = [one for one in ours if (numbers.number(one.measure("size.bits_per_weight")) or np.inf) <= size + SAME]
    return fits[-1] if fits else next(iter(ours), None)


def _standing(book: Book, entry: Entry, place: int, first: Entry, ours: list[Entry]) -> Standing:
    if numbers.number(entry.measure("quality.perplexity")) is None:
        return Standing(entry, None, False, None)
    rival = None if entry in ours else beside(ours, entry)
    to_first, to_ours = (_ratio(book, entry, other) for other in (first, rival))
    tied = entry is not first and to_first is not None and sign({k: to_first[k] - 1 for k in ("low", "high")}) == 0
    return Standing(entry, place, tied, to_ours, rival)


def _ratio(book: Book, entry: Entry, other: Entry | None) -> dict | None:
    """Perplexity over another's, on the same documents."""
    samples = together([book.baseline(entry), entry, other]) if other else None
    return samples and interval_of(np.exp(samples[1].nats - samples[2].nats), "ratio", samples[1].documents)


def timed(book: Book, name: str, phase: str) -> dict[str, Any]:
    """What the benchmark of tools measured for a strategy in a phase; empty where it did not."""
    rows = [row for row in book.bench if row.get("benchmark") == "tools"]
    facts = [row.get("facts") or {} for row in rows]
    return next((one for one in facts if one.get("phase") == phase and name in one.get("strategies", ())), {})


def speedup(book: Book, standing: Standing, bits: int, phase: str) -> dict | None:
    """How much faster than our bf16 layer, in the same rounds; ours from the rounds beside the first tool of the width."""
    if not standing.ours:
        return _measurement(timed(book, standing.entry.name, phase).get("speedup"))
    if standing.entry.name != OURS[bits][0]:
        return None  # its bits are mixed: no format of the benchmark is its
    others = [timed(book, e.entry.name, phase) for e in standings(book, standing.entry.model)[bits] if not e.ours]
    facts = next((one for one in others if one.get("ours_ms")), None)
    return facts and {"value": facts["bf16_ms"][0] / facts["ours_ms"][0], "unit": "ratio"}


def _measurement(values: Any) -> dict | None:
    return dict(zip(("value", "low", "high"), values)) | {"unit": "ratio"} if values else None


def league_table(book: Book, model: str | None = None) -> Table | None:
    """A heading per width; None where no tool was run."""
    table = standings(book, model)
    everyone = [(bits, one) for bits, members in table.items() for one in members]
    if not any(not one.ours for _, one in everyone):
        return None
    columns, cells = [Column("Strategy"), Column("Method"), Column("Place", numeric=True)], []
    cells.append([_named(book, one.entry, one.place) for _, one in everyone])
    cells += [[Cell(_method(s)) for _, s in everyone], [_place(s) for _, s in everyone]]
    figures = [(title, "Quality and size", [s.entry.measure(name) for _, s in everyone]) for title, name in BESIDE.items()]
    figures.append(("Perplexity over ours", "Quality and size", [Cell("") if s.ours else s.ratio for _, s in everyone]))
    where = "One 72B layer, over bf16"
    figures += [(title, where, [speedup(book, s, bits, phase) for bits, s in everyone]) for phase, title in PHASES.items()]
    figures.append(("Time", "Compressing", [spent(one.entry) for _, one in everyone]))
    figures.append(("Peak memory", "Compressing", [one.entry.measure("compress.peak_rss_bytes") for _, one in everyone]))
    for title, group, found in figures:
        column, written = measured(title, [None if isinstance(one, Cell) else one for one in found], group)
        columns.append(column)
        cells.append([one if isinstance(one, Cell) else cell for one, cell in zip(found, written)])
    columns.insert(5, Column("Keeps 99 %", "of the baseline", "Quality and size"))
    cells.insert(5, [Cell(book.gate(s.entry)) for _, s in everyone])
    columns.insert(5, Column("Over ours", "bits", "Quality and size", numeric=True))
    cells.insert(5, [_size(s) for _, s in everyone])
    rows: list[Any] = []
    for at, ((bits, _), row) in enumerate(zip(everyone, zip(*cells))):
        if not at or bits != everyone[at - 1][0]:
            rows.append(Group(f"{bits} bits", "tool"))
        rows.append(list(row))
    larger = [name for names in OURS.values() for name in names[1:]]
    caption = (
        "Every tool with the same model, calibration tokens and scorer, and our best recipes at each width. A tool is held "
        "against the largest of ours that takes no more bits per weight (zeros, which symmetric codes have not, are not counted); "
        f"{' and '.join(larger)} were added once llama.cpp’s larger types had been measured. “tied” says that "
        f"the paired 95 % interval against the first of the width holds no difference; “equal”, that bits per weight, with scales and "
        f"zeros, are within {EQUAL} of ours, so that the comparison is one at equal size. Speed-ups are those of "
        "the tool's own runtime on one true layer of Qwen-72B over our fastest bf16 layer in the same rounds. Times to compress "
        "are of the quantization step on the reference model, the least and the most of repeated runs in small print."
        f"{_places([one.entry for _, one in everyone])}"
    )
    return Table(columns, rows, caption, "league")


def _places(entries: list[Entry]) -> str:
    """Where times and memory were measured, if that was not one machine; the numbers of the smaller ones are named."""
    found: dict[str, list[str]] = {}
    for entry in (one for one in entries if spent(one)):
        machine = str((entry.record.get("provenance") or {}).get("cpu") or "an unknown machine")
        found.setdefault(machine, []).append(entry.name.removeprefix("tool-"))
    first, *others = sorted(found, key=lambda machine: -len(found[machine])) or [""]
    rest = "; ".join(f"on {machine} for {', '.join(found[machine])}" for machine in others)
    return f" Time and peak memory were measured on {first}; {rest}." if others else ""


def _named(book: Book, entry: Entry, place: int | None) -> Cell:
    """The strategy's name, and its state where there are no figures."""
    notes = (entry.label,) if place is None else ()
    return Cell(entry.name.removeprefix("tool-"), notes, link=f"#{book.anchor(entry)}")


def spent(entry: Entry) -> dict | None:
    """The time of a tool's quantization step with the spread of its runs; of ours the time of all passes."""
    runs = [run["seconds"] for run in told(entry).get("runs") or []]
    if not runs:
        return entry.measure("compress.seconds")
    return {"value": float(np.median(runs)), "unit": "seconds", "n": len(runs), "low": min(runs), "high": max(runs)}


def _method(standing: Standing) -> str:
    if standing.ours:
        return "ours: " + ", ".join(step["pass"] for step in standing.entry.params.get("recipe") or [])
    found = told(standing.entry)
    name, kind = found["name"], found["asked"].get("kind")
    known = about(name) if name in tool_names() else None
    stated = (known.kinds[kind].method if kind in known.kinds else known.method) if known else ""
    return str(found.get("method") or stated)


def _place(standing: Standing) -> Cell:
    if standing.place is None:
        return Cell(numbers.ABSENT, kind="absent")
    return Cell(str(standing.place), ("tied with the first",) if standing.tied else (), mark="best" if standing.place == 1 else "")


def _size(standing: Standing) -> Cell:
    """Bits per weight more than ours that it is held against, or that they are as many."""
    sizes = [numbers.number(e and e.measure("size.bits_per_weight")) for e in (standing.entry, standing.rival)]
    if standing.ours or None in sizes:
        return Cell("" if standing.ours else numbers.ABSENT)
    more = sizes[0] - sizes[1]
    words = "equal" if abs(more) <= EQUAL else f"{'+' if more > 0 else chr(0x2212)}{abs(more):.2f}"
    return Cell(words, (standing.rival.name,))


def league_words(book: Book) -> str:
    """Who is first at each width, who ties with it, and what failed."""
    facts = []
    for bits, members in standings(book).items():
        if not any(one.place for one in members):
            continue
        ties = [one.entry.name for one in members if one.tied]
        first = members[0].entry
        words = f"with {bits} bits {first.name} has the lowest perplexity, {numbers.write(first.measure('quality.perplexity'), 'value')}"
        facts.append(words + (f", and {', '.join(ties)} {'ties' if len(ties) == 1 else 'tie'} with it" if ties else ""))
    if not facts:
        return "No tool has been measured yet: make tools."
    everyone = [one for members in standings(book).values() for one in members if not one.ours]
    tools = {told(one.entry)["name"] for one in everyone if one.place}
    failed = sorted(one.entry.name for one in everyone if one.place is None)
    signs = [sign({end: one.ratio[end] - 1 for end in ("low", "high")}) for one in everyone if one.ratio]
    counts = [(signs.count(1), "higher"), (signs.count(-1), "lower"), (signs.count(0), "not measurably different")]
    beside = ", ".join(f"{word} in {count}" for count, word in counts if count)
    text = f"{len(tools)} tools in {sum(one.place is not None for one in everyone)} settings: {'; '.join(facts)}."
    text += f" Beside our recipe of the same width, perplexity is {beside} of them." if beside else ""
    return text + (f" Without figures: {', '.join(failed)}." if failed else "")
