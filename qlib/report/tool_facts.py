"""What a user should know of each tool beside its figures, and whether it got a fair run."""

from qlib.errors import UserError
from qlib.report import numbers
from qlib.report.book import Book, Entry
from qlib.report.html import Cell, Column, Table
from qlib.report.league import told
from qlib.tools.about import About, about, tool_names

__all__ = ["fairness_table", "ideas_table", "known", "tools_table"]


def known(name: str) -> About | None:
    """What an adapter says of its tool; None where a record is of a tool that has none any more."""
    try:
        return about(name) if name in tool_names() else None
    except UserError:
        return None


def by_tool(book: Book) -> dict[str, list[Entry]]:
    """Tool -> its strategies, those with figures first."""
    found: dict[str, list[Entry]] = {}
    for entry in sorted(book.of(family="tool"), key=lambda e: (told(e)["name"], not e.measurements)):
        found.setdefault(told(entry)["name"], []).append(entry)
    return found


def tools_table(book: Book) -> Table | None:
    """A row for each tool; None where none was run."""
    rows = []
    for name, entries in by_tool(book).items():
        facts, about_ = told(entries[0]), known(name)
        own = facts.get("facts") or {}
        version = (facts.get("versions") or {}).get(own.get("distribution", name), "")
        failed = [e for e in entries if not e.measurements]
        state = f"{len(entries) - len(failed)} of {len(entries)} settings"
        causes = tuple(dict.fromkeys(str(e.status.get("cause") or e.label).splitlines()[0] for e in failed))
        rows.append(
            [
                Cell(name, link=about_.documentation if about_ else ""),
                Cell(version or numbers.ABSENT, (f"released {own['released']}",) if own.get("released") else ()),
                Cell(own.get("licence") or "not stated"),
                Cell(own.get("python") or "not stated"),
                Cell(about_.runtime if about_ else ""),
                Cell(", ".join(about_.loads) if about_ else "", kind=""),
                Cell((about_.by_hand if about_ else "") or "nothing"),
                Cell(state, causes),
            ]
        )
    titles = ("Tool", "Version", "Licence", "Python", "Runs on a CPU by", "Others that load its models", "To be done by hand", "Measured")
    caption = "The tools: version and day of release, licence and Python versions as their packages state them, and what it takes to use them."
    return Table([Column(title) for title in titles], rows, caption, "tools") if rows else None


def fairness_table(book: Book) -> Table | None:
    """A row for each strategy of a tool whose run kept the evidence; None where none did."""
    rows = []
    for entry in (e for e in book.of(family="tool") if told(e).get("runs")):
        facts = told(entry)
        ids, plain, runs = facts["ids"], facts.get("uncompressed"), facts["runs"]
        other = "OTHERS" if ids["reached"] else "NONE"
        reached = {None: "reads no text", True: "the same", False: other}[ids["same"]]
        seconds = [run["seconds"] for run in runs]
        alike = len({run["digest"] for run in runs}) == 1
        values = [None, None] if plain is None else [plain["its"], plain["ours"]]
        shown = ["" if value is None else f"{value:.4f}" for value in values]
        rows.append(
            [
                Cell(entry.name, link=f"#{book.anchor(entry)}"),
                Cell(reached, (ids["given"][:12],)),
                Cell(str(facts.get("threads", ""))),
                Cell(shown[0] or "opens no runtime"),
                Cell(shown[1]),
                Cell({"weights": "exact weights", "runtime": "its own runtime"}[facts["scored"]]),
                Cell("the same values" if alike else "other values", (f"{len(runs)} runs",)),
                Cell(f"{min(seconds):.3g} to {max(seconds):.3g} s"),
            ]
        )
    titles = ("Strategy", "Tokens that reached it", "Threads", "Uncompressed perplexity in its runtime", "In ours", "Scored through", "Repeated", "Time of the step")
    caption = (
        "Whether the comparison is fair: hashes of the token ids, taken where they enter the tool's model; the uncompressed model in "
        "the tool's own runtime and in ours on the same calibration windows; and what repeated runs give."
    )
    return Table([Column(title) for title in titles], rows, caption, "fairness") if rows else None


def ideas_table() -> Table:
    """A paragraph for each tool that has an adapter, measured or not."""
    rows = []
    for name in tool_names():
        one = about(name)
        methods = sorted({kind.method for kind in one.kinds.values()}) or [one.method]
        rows.append([Cell(name, link=one.documentation), Cell(one.idea), Cell("; ".join(methods))])
    caption = "The idea of each tool, as its adapter states it."
    return Table([Column("Tool"), Column("Its idea"), Column("Methods measured here")], rows, caption, "ideas")
