"""Which tool for which need: answered from the records and benchmarks, beside what ours does."""

from dataclasses import dataclass
from typing import Callable

from qlib.report import numbers
from qlib.report.book import Book
from qlib.report.html import Cell, Column, Table
from qlib.report.league import Standing, spent, speedup, standings, told
from qlib.report.tool_facts import known

__all__ = ["needs_table"]

NEAR = 1.02  # of perplexity, over the best tool's: as good as need be where something else counts


@dataclass(frozen=True)
class Need:
    """A question: which strategies may answer it, and whose figure is the best answer."""

    title: str
    bits: int
    figure: Callable[[Book, Standing, int], dict | None]
    largest: bool = False
    fits: Callable[[Book, Standing], bool] = lambda book, one: True


def _perplexity(book: Book, one: Standing, bits: int) -> dict | None:
    return one.entry.measure("quality.perplexity")


def _phase(phase: str) -> Callable[[Book, Standing, int], dict | None]:
    return lambda book, one, bits: speedup(book, one, bits, phase)


def _spent(book: Book, one: Standing, bits: int) -> dict | None:
    return spent(one.entry)


def _reads_nothing(book: Book, one: Standing) -> bool:
    if one.ours:
        return False
    return (told(one.entry).get("ids") or {"same": False})["same"] is None


def _loads(program: str) -> Callable[[Book, Standing], bool]:
    def fits(book: Book, one: Standing) -> bool:
        about = None if one.ours else known(told(one.entry)["name"])
        return one.ours or bool(about and any(program in other for other in about.loads))

    return fits


def _near(book: Book, one: Standing) -> bool:
    members = [s for group in standings(book, one.entry.model).values() if one in group for s in group]
    best = min(numbers.number(s.entry.measure("quality.perplexity")) for s in members if s.place and not s.ours)
    return (numbers.number(one.entry.measure("quality.perplexity")) or 1e9) <= NEAR * best


NEEDS = (
    *(Need(f"Least loss with {bits} bits", bits, _perplexity) for bits in (8, 4, 3, 2)),
    Need("Least loss with 4 bits, without any text to calibrate on", 4, _perplexity, fits=_reads_nothing),
    Need("Least loss with 4 bits in a checkpoint that vLLM loads", 4, _perplexity, fits=_loads("vLLM")),
    Need("Least loss with 4 bits in a file that Ollama loads", 4, _perplexity, fits=_loads("Ollama")),
    Need("Fastest decode with 4 bits, one 72B layer", 4, _phase("decode"), largest=True),
    Need("Fastest prefill with 4 bits, one 72B layer", 4, _phase("prefill"), largest=True),
    Need("Fastest decode with 8 bits, one 72B layer", 8, _phase("decode"), largest=True),
    Need("Fastest prefill with 8 bits, one 72B layer", 8, _phase("prefill"), largest=True),
    Need(f"Least time to compress to 4 bits, with at most {NEAR - 1:.0%} more perplexity than the best tool", 4, _spent, fits=_near),
)


def needs_table(book: Book, model: str | None = None) -> Table | None:
    """A row for each need that anything measured here answers; None where nothing does."""
    rows = []
    for need in NEEDS:
        members = [s for s in standings(book, model).get(need.bits, []) if s.place and need.fits(book, s)]
        found = [(s, need.figure(book, s, need.bits)) for s in members]
        found = [(s, m) for s, m in found if numbers.number(m) is not None]
        found.sort(key=lambda pair: numbers.number(pair[1]) * (-1 if need.largest else 1))
        theirs = next(((s, m) for s, m in found if not s.ours), None)
        if theirs is None:
            continue
        ours = next(((s, m) for s, m in found if s.ours), None)
        link = f"#{book.anchor(theirs[0].entry)}"
        own = numbers.write(ours[1]) if ours else ""
        rows.append([Cell(need.title), Cell(theirs[0].entry.name, link=link), Cell(numbers.write(theirs[1])), Cell(own, (ours[0].entry.name,) if ours else ())])
    caption = "Which tool for which need: the setting whose figure is the best answer, and ours at the same width."
    titles = ("Need", "Tool and setting", "Its figure", "Ours")
    return Table([Column(title) for title in titles], rows, caption, "needs") if rows else None
