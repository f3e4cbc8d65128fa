"""What `qlib bench` measured: a table of targets, a sentence, how costs grow, and when sparse products pay."""

import json
import re
from pathlib import Path
from typing import Any, Sequence

from qlib.report import numbers
from qlib.report.html import Cell, Column, Group, Table

__all__ = [
    "BENCH", "read_bench", "bench_table", "bench_words", "growth_frame", "growth_alt", "sparse_frame", "sparse_alt",
]  # fmt: skip

BENCH = "bench.json"  # beside the published records
SENSES = {">=": "at least", "<=": "at most"}
POINT = re.compile(r"\b(\d+): ([\d.]+) s\b")  # of the time at one size
SPARSE = re.compile(r"\b(\d+) rows?: sparsity from which (\w+) is faster")
SPARSE_POINT = re.compile(r"\b(0\.\d+): ([\d.]+) ms")  # of the time at one sparsity
DENSE_POINT = re.compile(r"\b(bf16|int4-g128) ([\d.]+) ms")


def read_bench(file: Path) -> tuple[dict[str, Any], ...]:
    """The rows of a file of benchmarks; none where there is no such file or it cannot be read."""
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ()
    return tuple(row for row in rows if isinstance(row, dict)) if isinstance(rows, list) else ()


def verdict(row: dict[str, Any]) -> str:
    """``yes``, ``no``, ``not resolved`` or ``not measured``; empty where there is a figure and no target."""
    if numbers.number(row, "measured") is None:
        return numbers.ABSENT
    if not row.get("target", "any"):
        return ""
    return {True: "yes", False: "no"}.get(row.get("met"), numbers.OPEN)


def bench_table(rows: Sequence[dict[str, Any]]) -> Table | None:
    """Every target with what was measured, by benchmark; None where nothing was."""
    from qlib.bench.command import benchmarks

    about, shown = benchmarks(), []
    _, texts = numbers.column([_measurement(row) for row in rows])
    for at, (row, (text, interval)) in enumerate(zip(rows, texts)):
        name = str(row.get("benchmark"))
        if not at or name != str(rows[at - 1].get("benchmark")):
            shown.append(Group(about.get(name, name).rstrip(".")))
        met, sense = verdict(row), str(row.get("target", ""))
        target = " ".join(SENSES.get(word, word) for word in sense.split())
        kind = {"yes": "met", "no": "missed", numbers.ABSENT: "absent"}.get(met, "")
        cells = [Cell(target), Cell(text, (interval,)), Cell(str(row.get("unit", ""))), Cell(met, kind=kind)]
        shown.append([Cell(str(row.get("name", ""))), *cells, Cell(str(row.get("how", "")), kind="how")])
    columns = [Column("What is compared"), Column("Target", numeric=True), Column("Measured", numeric=True)]
    columns += [Column(title) for title in ("Unit", "Met", "How")]
    caption = (
        "Targets of the benchmarks, timed side by side in one run. Small print: 95 % intervals over rounds; a figure "
        "without one was measured once; one without a target answers a question. A target is met if the whole interval meets it, missed if none of it does, "
        "else not resolved."
    )
    return Table(columns, shown, caption, "bench") if rows else None


def _measurement(row: dict[str, Any]) -> dict[str, Any]:
    """A row as a measurement without unit; one round alone has no interval."""
    value, low, high = (numbers.number(row, name) for name in ("measured", "low", "high"))
    return {"value": value} | ({} if low == high else {"low": low, "high": high})


def bench_words(rows: Sequence[dict[str, Any]]) -> str:
    """How many targets are met, and on which machine and against which versions that was measured."""
    if not rows:
        return "These comparisons were not measured here: run make bench."
    rows, all_ = [row for row in rows if row.get("target", "any")], rows
    counts = [verdict(row) for row in rows]
    words = {"yes": "met", "no": "missed", numbers.OPEN: numbers.OPEN, numbers.ABSENT: numbers.ABSENT}
    facts = [f"{counts.count(key)} {word}" for key, word in words.items() if key in counts]
    found = [row["provenance"] for row in all_ if row.get("provenance")]
    where = f"Measured on {'; and on '.join(_places(found))}.{_tools(found)}" if found else "The file does not tell the machine."
    return f"{len(rows)} targets: {', '.join(facts)}. {where}"


def _places(found: Sequence[dict[str, Any]]) -> list[str]:
    """Machine, threads and versions, each once, with the commits that were measured there and the days."""
    places: dict[str, tuple[dict, dict]] = {}
    for one in found:
        packages = one.get("packages") or {}
        facts = [str(one.get("gpu") or one.get("cpu") or "an unknown machine"), f"{one.get('threads', '?')} threads"]
        facts += [f"Python {one.get('python', '?')}", *(f"{n} {packages[n]}" for n in ("torch",) if n in packages)]
        commits, days = places.setdefault(", ".join(facts), ({}, {}))
        commits[str(one.get("commit") or "unknown")[:10]] = days[str(one.get("started") or "")[:10]] = True
    return [
        ", ".join([place, f"commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}", *filter(None, days)])
        for place, (commits, days) in places.items()
    ]


def _tools(found: Sequence[dict[str, Any]]) -> str:
    """A sentence with every version of every tool; empty if there is none."""
    beside = sorted({f"{name} {version}" for one in found for name, version in (one.get("tools") or {}).items()})
    return f" Tools: {', '.join(beside)}." if beside else ""


def growth_frame(rows: Sequence[dict[str, Any]]):
    """of, size, seconds, exponent: times of the benchmark of cost growth, from the sizes that its rows list."""
    import pandas

    points = [
        {"of": str(row["name"]).rpartition(" in the ")[2], "size": int(size), "seconds": float(seconds)}
        | {"exponent": row.get("measured")}
        for row in rows
        if row.get("benchmark") == "growth"
        for size, seconds in POINT.findall(str(row.get("how", "")))
    ]
    return pandas.DataFrame(points, columns=["of", "size", "seconds", "exponent"])


def growth_alt(frame) -> str:
    """The finding of the figure of cost growth in words."""
    if frame.empty:
        return "Cost growth was not measured here."
    found = []
    for name, part in frame.groupby("of", sort=False):
        first, last = part.iloc[0], part.iloc[-1]
        found.append(
            f"with the {name} from {first['size']} to {last['size']} the time of GPTQ goes from {first['seconds']:.3g} "
            f"to {last['seconds']:.3g} seconds, a power of {first['exponent']:.2g}"
        )
    return f"{'; '.join(found)[:1].upper()}{'; '.join(found)[1:]}."


def sparse_frame(rows: Sequence[dict[str, Any]]):
    """rows, kernel, sparsity, ms, crossing: times of the benchmark of sparse products, from what its rows list.

    Dense kernels have neither a sparsity nor a crossing; 1 as a crossing says that the kernel is never faster than bf16.
    """
    import pandas

    points = []
    for row in (row for row in rows if row.get("benchmark") == "sparse"):
        found, how = SPARSE.search(str(row.get("name", ""))), str(row.get("how", ""))
        if not found or numbers.number(row, "measured") is None:
            continue
        batch, kernel = int(found[1]), found[2]
        points += [(batch, kernel, float(s), float(ms), row["measured"]) for s, ms in SPARSE_POINT.findall(how)]
        points += [(batch, name, None, float(ms), None) for name, ms in DENSE_POINT.findall(how)]
    frame = pandas.DataFrame(points, columns=["rows", "kernel", "sparsity", "ms", "crossing"])
    return frame.astype({"sparsity": float, "crossing": float}).drop_duplicates(ignore_index=True)


def sparse_alt(frame) -> str:
    """The finding of the figure of sparse products in words."""
    if frame.empty:
        return "Sparse products were not measured here."
    found = []
    for (batch, kernel), part in frame.dropna(subset="sparsity").groupby(["rows", "kernel"], sort=False):
        dense = frame[(frame["rows"] == batch) & frame["sparsity"].isna()].groupby("kernel")["ms"].first()
        first, crossing = part.iloc[0], part["crossing"].iloc[0]
        faster = f"is faster than bf16 from a sparsity of {crossing:.3g} on" if crossing < 1 else "is never faster than bf16"
        words = f"with {batch} row{'s' if batch > 1 else ''} {kernel} {faster}"
        words += f" and at {first['sparsity']:g} takes {first['ms'] / dense['bf16']:.2g} times as long"
        below = part[part["ms"] < dense["int4-g128"]]["sparsity"]
        passes = f"it passes dense int4 by {below.min():g}" if len(below) else "it never passes dense int4"
        found.append(f"{words}; {passes}")
    return ". ".join(one[:1].upper() + one[1:] for one in found) + "."
