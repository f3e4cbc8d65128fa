"""The article's table: what it claims, beside what was measured here and at the true shape of Qwen-72B."""

from dataclasses import dataclass

from qlib.report import numbers
from qlib.report.book import SPEED_MODEL, Book, Entry
from qlib.report.html import Cell, Column, Table
from qlib.report.relations import control_of, is_control, kinds, wholes

__all__ = ["CLAIMS", "QWEN_MMLU", "Claim", "article_table", "article_text", "chosen", "candidates", "smaller"]


@dataclass(frozen=True)
class Claim:
    """A row of the article's table, or one of ours that it does not have.

    Attributes:
        size, time, accuracy: what the article claims, in MB, ms and percent; None: it claims nothing.
        format: what the name of a strategy's number format must begin with to stand in this row.
        kind: what a strategy must do besides to stand in this row, as `relations.kinds` calls it.
        mmlu: the row of Qwen's own table that is closest, if any.
    """

    family: str
    title: str
    size: float | None = None
    time: float | None = None
    accuracy: float | None = None
    format: str = ""
    kind: str = ""
    mmlu: str = ""


#: The table as the Chinese article prints it (it names neither model nor data nor device), and what it leaves out.
CLAIMS = (
    Claim("baseline", "None", 150, 120, 95.2, mmlu="bf16"),
    Claim("pruning", "Pruning", 100, 90, 94.5),
    Claim("weight_quantization", "Weight quantization", 75, 70, 93.8, format="int4", mmlu="int4"),
    Claim("mixed_precision", "Mixed precision", 80, 75, 94.0),
    Claim("finetuning", "Pruning, then recovery", kind="prune"),
    Claim("finetuning", "Post-quantization fine-tuning", kind="quantize"),
    Claim("combined", "Combined"),
)

#: MMLU of Qwen-72B-Chat as its authors report it: https://github.com/QwenLM/Qwen, README, section Quantization.
QWEN_MMLU = {"bf16": 74.4, "int8": 73.5, "int4": 73.4}

#: Groups of columns by their first word, short enough for a terminal.
SHORT = {"Claimed": "claimed:", "Measured": "here:", "At": "72B:"}

UNMEASURED = "not measured yet"
UNCLAIMED = Cell("not claimed", kind="absent")
SMALLER = 0.95  # a strategy counts as smaller from this share of the baseline's bytes on disk


def candidates(book: Book, claim: Claim) -> list[Entry]:
    """The measured strategies of a row's family and kind; of combined recipes only the whole ones.

    Those of tier core, if there are any: of many variants the one with the most accuracy would owe it to chance.
    """
    rows = [e for e in book.of(family=claim.family) if e.measurements and not is_control(e)]
    rows = [e for e in rows if not claim.kind or claim.kind in kinds(e)]
    home = "cpu" if any(e.device == "cpu" for e in rows) else None
    rows = [e for e in rows if e.device == (home or e.device)]
    rows = [e for e in rows if str(e.record.get("shape_format") or "").startswith(claim.format)]
    return wholes(book, [e for e in rows if e.tier == "core"] or rows)


def chosen(book: Book, claim: Claim) -> Entry | None:
    """The strategy that stands for a row: of those that become as small as claimed, the one that loses least accuracy.

    Where none does, it is the one that loses least among those at least 5 % smaller than the baseline. Smaller means on
    disk and in memory: zeros that a file leaves out are back when it is loaded, so that they never qualify.
    """
    rows = candidates(book, claim)
    if claim.family == "baseline":
        return next(iter(rows), None)
    small = [e for e in rows if claim.size and smaller(book, e, claim.size / CLAIMS[0].size)]
    return max(small or [e for e in rows if smaller(book, e)], key=_accuracy, default=None)


def smaller(book: Book, entry: Entry, share: float = SMALLER) -> bool:
    """Whether the strategy takes at most this share of the baseline's bytes, on disk, and less of them in memory."""
    baseline = book.baseline(entry)
    size, whole = (numbers.number(e and e.measure("size.disk_bytes")) for e in (entry, baseline))
    held, all_ = (numbers.number(e and e.measure("size.resident_bytes")) for e in (entry, baseline))
    if held and all_ and held > SMALLER * all_:
        return False
    return bool(size and whole and size <= share * whole)


def _accuracy(entry: Entry) -> float:
    for name in ("quality.accuracy_delta", "quality.accuracy"):
        if (value := numbers.number(entry.measure(name))) is not None:
            return value
    return -float("inf")


def article_table(book: Book) -> Table:
    """Size, request time and accuracy: claimed, measured on the quality subject, and at the shape of Qwen-72B."""
    subject = next(iter(book.models), "quality subject")  # the name of its own speed record, too
    groups = ("Claimed by the article", f"Measured on {subject}", "At the true shape of Qwen-72B")
    rows = [_row(book, claim, subject) for claim in CLAIMS]
    columns = [Column("Method")]
    titles = ("Size on disk", "Request time", "Accuracy")
    columns += [Column(title, "", group, numeric=True) for group in groups for title in titles]
    caption = (
        "What the article claims, and what was measured. A request is a prefill of 256 tokens and 32 new ones, "
        "batch 1. Small print: interval, and how many times smaller or faster than without compression. A row shows "
        "the strategy that loses least accuracy among those of its family that make report runs and that "
        "become as small as claimed; where none does or nothing is claimed, among those at least 5 % smaller than the "
        "baseline, on disk and in memory. A control is the "
        "uncompressed model trained with the same tokens, schedule and seed. 1 MB = 1,000,000 bytes."
    )
    return Table(columns, rows, caption, "article")


def article_text(book: Book) -> str:
    """The article's table for a terminal: the main line of every cell, without intervals."""
    from qlib.runs.listing import table

    found = article_table(book)
    heads = [f"{SHORT.get(column.group.partition(' ')[0], '')} {column.title}".strip() for column in found.columns]
    rows = [[cell.text for cell in row] for row in found.rows]
    for row, cells in zip(rows, found.rows):
        row[0] += f" ({cells[0].notes[0]})" if cells[0].notes and cells[0].notes[0] else ""
    return table(rows, tuple(heads), tuple(heads[1:]))


def _row(book: Book, claim: Claim, subject: str) -> list[Cell]:
    entry = chosen(book, claim)
    cells = [Cell(claim.title, (_name(entry),)), *_claimed(claim)]
    if entry is None:
        why = "none becomes smaller" if candidates(book, claim) else UNMEASURED
        return cells + [Cell(why, kind="absent")] * 5 + [_published(claim)]
    baseline, control = book.baseline(entry), control_of(book, entry)
    disk, whole = entry.measure("size.disk_bytes"), baseline and baseline.measure("size.disk_bytes")
    accuracy, delta = entry.measure("quality.accuracy"), entry.measure("quality.accuracy_delta")
    change = f"{numbers.write(delta, 'value')} ({numbers.interval(delta)})" if numbers.number(delta) is not None else ""
    trained_on = f"control {numbers.write(control.measure('quality.accuracy'), 'value')}" if control else ""
    cells += [
        Cell(numbers.write(disk), (_smaller(whole, disk),)),
        _request(book, entry, subject),
        Cell(numbers.write(accuracy, "value"), (numbers.interval(accuracy), change, trained_on)),
    ]
    shape = book.shape(entry, SPEED_MODEL, _device(book, entry, SPEED_MODEL)).get("size.disk_bytes")
    base = baseline and book.shape(baseline, SPEED_MODEL, _device(book, baseline, SPEED_MODEL)).get("size.disk_bytes")
    cells.append(Cell(numbers.write(shape), (_smaller(base, shape),)))
    return [*cells, _request(book, entry, SPEED_MODEL), _published(claim)]


def _claimed(claim: Claim) -> list[Cell]:
    if not claim.size:
        return [UNCLAIMED] * 3
    first = CLAIMS[0]
    return [
        Cell(f"{claim.size:.0f} MB", (_times(first.size, claim.size, "smaller"),)),
        Cell(f"{claim.time:.0f} ms", (_times(first.time, claim.time, "faster"),)),
        Cell(f"{claim.accuracy:.1f} %", (_points(first.accuracy, claim.accuracy),)),
    ]


def _name(entry: Entry | None) -> str:
    if entry is None:
        return ""
    return entry.name + ("" if entry.state == "done" else f" ({entry.label})")


def _device(book: Book, entry: Entry, model: str) -> str:
    devices = book.speed.get(model, {})
    return entry.device if entry.device in devices else next(iter(devices), entry.device)


def _request(book: Book, entry: Entry, model: str) -> Cell:
    """Request time on every device that has a speed record of this shape; speed-up from the same record."""
    devices = sorted(book.speed.get(model, {}), key=lambda device: device != entry.device)
    lines = []
    for device in devices:
        time = book.shape(entry, model, device).get("latency.request_ms")
        if numbers.number(time) is None:
            continue
        text = numbers.write(time, "value") + (f" on {device}" if len(devices) > 1 else "")
        faster = book.shape(entry, model, device).get("latency.request_speedup")
        compared = entry.family != "baseline" and numbers.number(faster) is not None
        words = numbers.speedup(faster) if compared else ""
        lines += [text, numbers.interval(time), f"{words} as fast" if words not in ("", numbers.SAME) else words]
    if lines:
        return Cell(lines[0], tuple(lines[1:]))
    format = str(entry.record.get("shape_format"))
    untimed = bool(devices) and format not in ("None", "bf16")
    return Cell(f"not timed: no speed record has {format}" if untimed else numbers.ABSENT, kind="absent")


def _smaller(whole: dict | None, part: dict | None) -> str:
    times = numbers.ratio(whole, part)
    return f"{times} smaller" if times and whole is not part else ""


def _times(whole: float, part: float, word: str) -> str:
    times = numbers.ratio({"value": whole}, {"value": part})
    return "" if whole == part else f"{times} {'as fast' if word == 'faster' else word}"


def _points(whole: float, part: float) -> str:
    return "" if whole == part else f"{'−' if part < whole else '+'}{abs(part - whole):.1f} points"


def _published(claim: Claim) -> Cell:
    """Random weights have no accuracy; what Qwen's authors report for the trained model stands below."""
    text = "not measured (random weights)"
    if not claim.mmlu:
        return Cell(text, kind="absent")
    value, whole = QWEN_MMLU[claim.mmlu], QWEN_MMLU["bf16"]
    change = f", {_points(whole, value)}" if value != whole else ""
    return Cell(text, (f"Qwen reports MMLU {value} for {claim.mmlu}{change}",), kind="absent")
