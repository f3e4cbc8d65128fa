"""The report's tables: the full comparison, speed at true shapes, failures, and where every number comes from."""

from itertools import groupby
from typing import Sequence

from qlib.progress import clock
from qlib.report import numbers
from qlib.report.article import article_table
from qlib.report.bench import bench_table
from qlib.report.book import SPEED_MODEL, Book, Entry
from qlib.report.either import either_table
from qlib.report.html import Cell, Column, Group, Table, mark_best, measured
from qlib.report.league import league_table
from qlib.report.literature import literature_table
from qlib.report.measures import MEASURES, family_label
from qlib.report.needs import needs_table
from qlib.report.quantized import arranged, heading
from qlib.report.relations import is_control, kinds
from qlib.report.tool_facts import fairness_table, ideas_table, tools_table
from qlib.report.trained import ablation_table, precision_table, recovery_table

__all__ = [
    "article_table", "comparison", "recovery_table", "precision_table", "ablation_table", "literature_table",
    "either_table", "speed_table", "failures", "provenance", "floor", "rerun", "bench_table", "league_table",
    "tools_table", "fairness_table", "ideas_table", "needs_table",
]  # fmt: skip

#: Columns of the comparison: group, title, measurement name.
COMPARED = (
    ("Quality", "Accuracy", "quality.accuracy"),
    ("Quality", "Accuracy change, paired", "quality.accuracy_delta"),
    ("Quality", "Keeps 99 %", ""),
    ("Quality", "Perplexity", "quality.perplexity"),
    ("Quality", "Perplexity ratio, paired", "quality.perplexity_ratio"),
    ("Quality", "Bits per byte", "quality.bits_per_byte"),
    ("Quality", "KL divergence", "quality.kl"),
    ("Quality", "Top-1 agreement", "quality.top1_agreement"),
    ("Size", "Bits per weight", "size.bits_per_weight"),
    ("Size", "On disk", "size.disk_bytes"),
    ("Size", "In memory", "size.resident_bytes"),
    ("Speed", "Prefill", "shape.latency.prefill_ms"),
    ("Speed", "Decode, per token", "shape.latency.decode_ms"),
    ("Speed", "Prefill speed-up", "shape.latency.prefill_speedup"),
    ("Speed", "Decode speed-up", "shape.latency.decode_speedup"),
    ("Compressing", "Time", "compress.seconds"),
    ("Compressing", "Peak memory", "compress.peak_rss_bytes"),
    ("Training", "Time", "train.seconds"),
)
#: What a family's own table shows of them, where no group says what a title is about.
FEWER = {
    "quality.accuracy_delta": "Accuracy change, paired",
    "": "Keeps 99 %",
    "quality.perplexity_ratio": "Perplexity ratio, paired",
    "quality.kl": "KL divergence",
    "size.bits_per_weight": "Bits per weight",
    "size.disk_bytes": "On disk",
    "shape.latency.decode_speedup": "Decode speed-up, true shape",
    "compress.seconds": "Time to compress",
    "train.seconds": "Time to train",
}

NONE = Cell("n/a", kind="absent")  # what a baseline cannot have


def comparison(book: Book, model: str | None = None, shape: str = SPEED_MODEL, family: str | None = None) -> Table:
    """Every strategy of a model (default: the first), all measurements, speeds at a true shape.

    Args:
        family: show its strategies only, and fewer columns.
    """
    first = next(iter(book.models), "the quality subject")
    model = model or first
    entries = arranged(book.of(model, family))
    heads = [heading(entry, short=bool(family)) for entry in entries]
    columns, cells = [Column("Strategy")], []
    eligible = [e.family != "baseline" and not is_control(e) for e in entries]
    shown = [("", FEWER[name], name) for _, _, name in COMPARED if name in FEWER] if family else COMPARED
    for group, title, name in shown:
        group = f"Speed at the shape of {shape}" if group == "Speed" else group
        if not name:
            columns.append(Column(title, "of the baseline", group))
            cells.append([Cell("baseline" if e.family == "baseline" else book.gate(e)) for e in entries])
            continue
        found = [_look_up(book, entry, name, shape) for entry in entries]
        if name.startswith("train.") and not any(found):
            continue
        column, written = measured(title, found, group)
        written = [NONE if _cannot(e, name) and c.text == numbers.ABSENT else c for c, e in zip(written, entries)]
        columns.append(column)
        groups = heads if family else [""] * len(heads)
        cells.append(_marked_by(groups, name.removeprefix("shape."), written, found, eligible))
    rows = [[_link(entry, book), *rest] for entry, rest in zip(entries, zip(*cells))]
    among = "those under the same heading" if family and any(heads) else "the compressed strategies"
    caption = (
        f"{f'{family_label(family)}: the strategies' if family else 'Every strategy'} on {model}"
        f"{f', speed at the shape of {shape}' if family else ''}. Small print: 95 % "
        f"bootstrap intervals. “best” marks the best value among {among}; two of them differ only "
        "where a paired interval says so. 1 MB = 1,000,000 bytes."
    )
    id = f"family-{family}" if family else "comparison"
    id = id if model == first else f"{id}-{model}"
    return Table(columns, _grouped(entries, heads, rows), caption, id)


def _cannot(entry: Entry, name: str) -> bool:
    """Whether a figure makes no sense for the strategy: a baseline's change, the training of what was not trained."""
    return entry.family == "baseline" or (name.startswith("train.") and "train" not in kinds(entry))


def _marked(name: str, written: list[Cell], found: list[dict | None], eligible: list[bool]) -> list[Cell]:
    """A column with its best value marked; a speed-up that cannot be told from none says so and is never best."""
    same = [name.endswith("_speedup") and numbers.speedup(m) == numbers.SAME for m in found]
    written = [Cell(numbers.SAME, c.notes, kind="words") if alike else c for c, alike in zip(written, same)]
    return mark_best(written, found, MEASURES[name].better, [fine and not alike for fine, alike in zip(eligible, same)])


def _marked_by(groups: Sequence[str], name: str, written: list[Cell], found: list, eligible: list[bool]) -> list[Cell]:
    """The same in each group of neighbours by itself."""
    cells: list[Cell] = []
    for _, members in groupby(range(len(groups)), key=lambda at: groups[at]):
        part = slice(len(cells), len(cells) + len(list(members)))
        cells += _marked(name, written[part], found[part], eligible[part])
    return cells


def _look_up(book: Book, entry: Entry, name: str, shape: str) -> dict | None:
    if not name.startswith("shape."):
        return entry.measure(name)
    return book.shape(entry, shape).get(name.removeprefix("shape."))


def _link(entry: Entry, book: Book) -> Cell:
    """The strategy's name, leading to its section; below it what sets it apart from a run that finished here."""
    twins = [e for e in book.strategies if (e.name, e.model) == (entry.name, entry.model)]
    link = f"#{book.anchor(entry)}" if entry in book.strategies else ""
    notes = ([entry.device] if len(twins) > 1 else []) + ([entry.label] if entry.state != "done" else [])
    return Cell(entry.name, tuple(notes), link=link)


def _grouped(entries: Sequence[Entry], heads: Sequence[str], rows: Sequence[list[Cell]]) -> list[list[Cell] | Group]:
    """Rows under their headings, where they have any."""
    grouped: list[list[Cell] | Group] = []
    for at, (entry, head, row) in enumerate(zip(entries, heads, rows)):
        if head and (not at or head != heads[at - 1]):
            grouped.append(Group(head, entry.family))
        grouped.append(row)
    return grouped


def floor(measures: dict[str, dict]) -> dict | None:
    """The roofline floor of a decode step: measured time x its share of the roofline."""
    time, share = (numbers.number(measures.get(f"latency.{name}")) for name in ("decode_ms", "roofline_fraction"))
    return None if time is None or share is None else {"value": time * share, "unit": "ms"}


def speed_table(entry: Entry) -> Table:
    """All formats of one speed record, and how far their decode step is from its roofline floor."""
    formats: dict[str, dict[str, dict]] = entry.record["formats"]
    names = list(formats)
    columns, cells = [Column("Format")], [[Cell(name) for name in names]]
    for title, name in (
        ("On disk", "size.disk_bytes"),
        ("Bits per weight", "size.bits_per_weight"),
        ("Prefill", "latency.prefill_ms"),
        ("Prefill speed-up", "latency.prefill_speedup"),
        ("Decode, per token", "latency.decode_ms"),
        ("Decode speed-up", "latency.decode_speedup"),
        ("Roofline floor", "floor"),
        ("Request", "latency.request_ms"),
        ("Time to compress", "compress.seconds"),
    ):
        found = [floor(formats[f]) if name == "floor" else formats[f].get(name) for f in names]
        column, written = measured(title, found)
        if name.endswith("_speedup") or name == "compress.seconds":
            written = [NONE if f == "bf16" else cell for f, cell in zip(names, written)]
        columns.append(column)
        cells.append(_marked(name, written, found, [True] * len(names)) if name in MEASURES else written)
    columns.append(Column("Kernels"))
    cells.append([Cell(kernels(entry.record, name)) for name in names])
    rows = [list(row) for row in zip(*cells)]
    all_of_them = (m for measures in formats.values() for m in measures.values())
    how = next((f"Conditions: {m['conditions']}." for m in all_of_them if m.get("conditions")), "")
    caption = (
        f"Number formats at the shape of {entry.model} on {entry.device}, random weights, timed in interleaved rounds "
        "of one process. Speed-ups are paired ratios to bf16. The floor is the bytes that a token must read over the "
        f"read bandwidth measured in the same rounds. {how}"
    )
    return Table(columns, rows, caption.strip(), f"speed-{entry.model}-{entry.device}")


def kernels(record: dict, name: str) -> str:
    """The kernels a format ran on in a layer, by phase."""
    layer = (record.get("details") or {}).get("layer") or {}
    found = {phase: (layer.get(phase) or {}).get("kernels", {}).get(name) for phase in ("decode", "prefill")}
    parts = [f"{phase}: {', '.join(dict.fromkeys(used.values()))}" for phase, used in found.items() if used]
    return "; ".join(parts) or "not recorded"


def rerun(entry: Entry) -> str:
    """The command that runs just this strategy again. A run with changed parameters has a ``+`` in its name."""
    name, changed, _ = entry.name.partition("+")
    if entry.family == "lesson":
        return f"qlib run {name}"
    return f"qlib run params/{name}.yaml" + (" with the same -p options" if changed else "")


def failures(book: Book) -> Table | None:
    """Strategies that failed: why, in which cell, what was said last, and how to run just them. None if none did."""
    rows = []
    for entry in book.failures:
        cell = entry.status.get("cell") or {}
        where = f"cell {cell.get('index', '?')} ({cell.get('id', '?')})" if cell else "between cells"
        last = tuple(map(str, (entry.status.get("last_lines") or [])[-3:]))
        cause = str(entry.status.get("cause") or "no cause was recorded")
        facts = (Cell(entry.label), Cell(cause), Cell(where), Cell("", last), Cell(rerun(entry)))
        rows.append([Cell(entry.name, link=_link(entry, book).link), *facts])
    columns = [Column(t) for t in ("Strategy", "State", "Cause", "Cell", "Last lines", "Run just this")]
    return Table(columns, rows, "What failed. A failure stops no other strategy.", "failures") if rows else None


def provenance(book: Book) -> Table:
    """One line per run: code, lock, machine, seed, time and memory."""
    columns = "Run, Model, State, Commit, Lock, Processor, Threads, Seed, Started, Took, Peak memory, Key".split(", ")
    rows = []
    for entry in (e for e in book.entries if e.record):
        found = entry.record.get("provenance") or {}
        commit = str(found.get("commit") or "unknown")[:10] + (", changed files" if found.get("dirty") else "")
        seconds = numbers.number({"value": entry.record.get("duration_seconds")})
        memory = entry.record.get("peak_memory_bytes") or {}
        peak = numbers.write({"value": memory.get("value"), "unit": "bytes"}) if isinstance(memory, dict) else ""
        rows.append(
            [
                Cell(entry.name, (entry.device,), link=book.page(entry)),
                Cell(entry.model),
                Cell(entry.label),
                Cell(commit),
                Cell(str(found.get("lock_sha256") or "unknown")[:10]),
                Cell(str(found.get("gpu") or found.get("cpu") or "unknown"), (f"Python {found.get('python', '?')}",)),
                Cell(str(found.get("threads") or "unknown")),
                Cell(str(found.get("seed", (entry.params or {}).get("seed", "unknown")))),
                Cell(str(found.get("started") or "unknown").replace("T", " ")[:16]),
                Cell(clock(seconds) if seconds is not None else numbers.ABSENT),
                Cell(peak, (str(memory.get("method") or ""),) if isinstance(memory, dict) else ()),
                Cell(str(entry.record.get("key") or "none")[:10]),
            ]
        )
    caption = (
        "Where every number comes from. A run is repeated only if its key changes: code, parameters, versions, data "
        "or device."
    )
    aligned = ("Threads", "Seed", "Started", "Took", "Peak memory")
    return Table([Column(title, numeric=title in aligned) for title in columns], rows, caption, "provenance")
