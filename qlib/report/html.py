"""Tables as HTML: caption, scope on every header, aligned decimals, and a first column that stays while one scrolls."""

from dataclasses import dataclass
from html import escape
from typing import Sequence

from qlib.report.numbers import ABSENT, bind, column, number

__all__ = ["Cell", "Column", "Group", "Table", "measured", "mark_best", "slug"]

LONG = 24  # letters from which a cell is given room on a small screen
TALL = 40  # rows from which a table scrolls under its header
SHARED = 3  # a best value that more share sets nobody apart


@dataclass(frozen=True)
class Cell:
    """What stands in a table's cell: text, smaller lines below it, a word that marks it, and a link."""

    text: str
    notes: tuple[str, ...] = ()
    mark: str = ""
    link: str = ""
    kind: str = ""

    def html(self) -> str:
        text = escape(self.text)
        text = f'<a href="{escape(self.link)}">{text}</a>' if self.link else text
        text = f'<strong>{text}</strong> <span class="mark">{escape(self.mark)}</span>' if self.mark else text
        return text + "".join(f'<span class="note">{escape(note)}</span>' for note in self.notes if note)


@dataclass(frozen=True)
class Column:
    """A table's column: its title, the unit that stands under it, and the heading it shares with its neighbours."""

    title: str
    unit: str = ""
    group: str = ""
    numeric: bool = False


@dataclass(frozen=True)
class Group:
    """A row that names the rows below it."""

    title: str
    family: str = ""


@dataclass(frozen=True)
class Table:
    """A table that displays itself in a notebook. The first column heads its row; the report numbers those it shall."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell] | Group]
    caption: str
    id: str
    numbered: bool = True

    def _head(self) -> str:
        groups = [column.group for column in self.columns]
        if not any(groups):
            return f"<thead><tr>{''.join(self._title(c) for c in self.columns)}</tr></thead>"
        above, below, at = [], [], 0
        while at < len(groups):
            width = next((i for i, g in enumerate(groups[at:]) if g != groups[at]), len(groups) - at)
            if groups[at]:
                above.append(f'<th scope="colgroup" colspan="{width}">{escape(groups[at])}</th>')
                below += [self._title(c) for c in self.columns[at : at + width]]
            else:
                above += [self._title(c, rows=2) for c in self.columns[at : at + width]]
            at += width
        return f"<thead><tr>{''.join(above)}</tr><tr>{''.join(below)}</tr></thead>"

    @staticmethod
    def _title(column: Column, rows: int = 1) -> str:
        unit = f'<span class="note">{escape(column.unit)}</span>' if column.unit else ""
        span = f' rowspan="{rows}"' if rows > 1 else ""
        kind = ' class="num"' if column.numeric else ""
        return f'<th scope="col"{span}{kind}>{escape(column.title)}{unit}</th>'

    def _opens(self, at: int) -> bool:
        """True where a group of columns begins: a line separates it from what stands before."""
        return at > 0 and bool(self.columns[at].group) and self.columns[at].group != self.columns[at - 1].group

    def _row(self, row: Sequence[Cell] | Group) -> str:
        if isinstance(row, Group):
            key = f'<span class="key {slug(row.family)}"></span> ' if row.family else ""
            wide = f'scope="rowgroup" colspan="{len(self.columns)}"'  # its words stay in view while the table scrolls
            return f'<tr class="group"><th {wide}><span class="stay">{key}{escape(row.title)}</span></th></tr>'
        cells = [f'<th scope="row">{row[0].html()}</th>']
        for at, (cell, column) in enumerate(zip(row[1:], self.columns[1:], strict=True), start=1):
            kinds = ["num"] * column.numeric + ["absent"] * (cell.text == ABSENT) + [cell.kind] * bool(cell.kind)
            kinds += ["opens"] * self._opens(at) + ["long"] * (len(cell.text) > LONG)
            kind = f' class="{escape(" ".join(kinds))}"' if kinds else ""
            cells.append(f"<td{kind}>{cell.html()}</td>")
        return f"<tr>{''.join(cells)}</tr>"

    def _bodies(self) -> str:
        """Rows in one ``tbody`` per group, which is what ``scope=rowgroup`` speaks of."""
        bodies: list[list[str]] = [[]]
        for row in self.rows:
            if isinstance(row, Group) and bodies[-1]:
                bodies.append([])
            bodies[-1].append(self._row(row))
        return "".join(f"<tbody>{''.join(body)}</tbody>" for body in bodies)

    def _repr_html_(self) -> str:
        name = f"table-{slug(self.id)}"
        label = escape(self.caption.split(". ")[0].rstrip("."))
        number = f'<span class="number" data-ref="{name}"></span>' if self.numbered else ""
        tall = " tall" * (len(self.rows) > TALL)
        return (
            f'<div class="scroll{tall}" role="region" aria-label="Table: {label}" tabindex="0" style="overflow-x:auto">'
            f'<table id="{name}" class="facts"><caption><span class="caption">{number}'
            f"{escape(bind(self.caption))}</span></caption>{self._head()}{self._bodies()}</table></div>"
        )

    def __repr__(self) -> str:
        return f"Table {self.id}: {self.caption} ({len(self.rows)} rows)"


def slug(text: str) -> str:
    """Letters, digits, dots and hyphens of `text` in lower case: safe in an id, a class or a file name."""
    kept = "".join(c if c.isascii() and (c.isalnum() or c in ".-") else "-" for c in str(text).lower())
    return "-".join(part for part in kept.split("-") if part)[:80] or "x"


def measured(title: str, measurements: Sequence[dict | None], group: str = "") -> tuple[Column, list[Cell]]:
    """A column of measurements with its unit in the header, and its cells: value above, interval below."""
    unit, texts = column(list(measurements))
    return Column(title, unit, group, numeric=True), [Cell(text, (interval,)) for text, interval in texts]


def mark_best(
    cells: list[Cell], measurements: Sequence[dict | None], better: str, eligible: Sequence[bool]
) -> list[Cell]:
    """Mark the best of the eligible cells by the word ``best``, if there is something to choose from."""
    values = [number(m) if fine else None for m, fine in zip(measurements, eligible)]
    known = [value for value in values if value is not None]
    if not better or len(known) < 2 or min(known) == max(known):
        return cells
    best = max(known) if better == "higher" else min(known)
    if known.count(best) > SHARED:
        return cells
    return [
        Cell(cell.text, cell.notes, "best", cell.link, cell.kind) if value == best else cell
        for cell, value in zip(cells, values)
    ]
