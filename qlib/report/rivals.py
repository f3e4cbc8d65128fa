"""Our best recipes against outside tools at as many bits, paired by documents: a table and a sentence."""

import numpy as np

from qlib.report import numbers
from qlib.report.book import Book, Entry
from qlib.report.html import Cell, Column, Table
from qlib.report.pairs import interval_of, sign, together
from qlib.report.quantized import arranged, width_of
from qlib.report.show import table

__all__ = ["OURS", "rivals_table", "rival_words"]

OURS = "best-int{}"  # what stands for us at a width: named before anything was measured on the evaluation texts
BESIDE = {
    "Perplexity": "quality.perplexity",
    "Bits per weight": "size.bits_per_weight",
    "Time to compress": "compress.seconds",
}


def against(book: Book, tool: Entry) -> tuple[Entry | None, dict | None, str]:
    """Our entry at the tool's width, its perplexity over the tool's, and which is better by the paired interval."""
    ours = next((e for e in book.of(tool.model) if e.name == OURS.format(width_of(tool))), None)
    samples = together([book.baseline(tool), ours, tool])
    if samples is None:
        return ours, None, numbers.ABSENT
    more, documents = samples[1].nats - samples[2].nats, samples[1].documents
    word = {0: numbers.SAME, 1: "worse", -1: "better"}[sign(interval_of(more, "nats", documents))]
    return ours, interval_of(np.exp(more), "ratio", documents), word


def rivals_table(book: Book, model: str | None = None) -> Table | None:
    """One row for each strategy of a tool; None where there is none."""
    rows = []
    for tool in arranged(book.of(model, "tool")):
        ours, ratio, word = against(book, tool)
        names = [Cell(e.name, link=f"#{book.anchor(e)}") if e else Cell(numbers.ABSENT) for e in (tool, ours)]
        rows.append([*names, word, ratio, *(e and e.measure(name) for name in BESIDE.values() for e in (ours, tool))])
    columns = ["Tool", "Ours", "Ours is", "Perplexity ratio, ours over the tool's"]
    columns += [Column(whose, "", title) for title in BESIDE for whose in ("Ours", "Tool")]
    caption = (
        "Our recipe for each width against outside tools, on the same documents. A ratio below 1 says that ours is "
        "better; “no measurable difference” that the paired 95 % interval holds 1."
    )
    return table(columns, rows, caption, "rivals") if rows else None


def rival_words(book: Book) -> str:
    """Than how many strategies of tools ours is better, worse, or not measurably different."""
    words = [against(book, tool)[2] for tool in book.of(family="tool")]
    known = [word for word in words if word != numbers.ABSENT]
    if not known:
        return "No tool has been compared with ours yet: qlib tools install, then make report-full."
    counts = (f"{word} in {known.count(word)}" for word in ("better", "worse", numbers.SAME) if word in known)
    return f"Of {len(known)} comparisons, perplexity of ours is {', '.join(counts)}.".replace(
        f"{numbers.SAME} in", "not measurably different in"
    )
