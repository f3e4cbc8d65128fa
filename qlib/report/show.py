"""What notebooks display: a figure with caption and alternative text, a table, and a strategy's summary."""

import io
import re
from dataclasses import replace
from html import escape
from typing import Any, Sequence

from qlib.errors import UserError
from qlib.report import numbers
from qlib.report.html import Cell, Column, Table, slug
from qlib.report.measures import label
from qlib.report.theme import themed

__all__ = ["show", "show_table", "table", "summary", "svg", "figure_html", "data_table"]

DATA_ROWS = 200  # a longer data frame is cut: the record holds it whole


def show(figure, id: str, caption: str, alt: str, data=None) -> None:
    """Display a matplotlib figure as inline SVG, numbered by the report.

    Args:
        id: names the figure in its notebook; Markdown refers to it by ``[](#fig-ID)``.
        caption: what is drawn, and what the error bars mean.
        alt: the finding, in words, for who cannot see the figure.
        data: the data frame behind it, shown on demand.

    Raises:
        UserError: id, caption or alternative text is empty.
    """
    from IPython.display import HTML, display

    display(HTML(figure_html(figure, id, caption, alt, data)))


def figure_html(figure, id: str, caption: str, alt: str, data=None) -> str:
    """The HTML that `show` displays. Where no data are behind a figure, its alternative text stands in its place."""
    for name, text in {"id": id, "caption": caption, "alt": alt}.items():
        if not str(text).strip():
            raise UserError(f"show: {name} of figure '{id}' is empty; a figure needs one to be understood")
    name = f"fig-{slug(id)}"
    details, drawn = "", svg(figure, name, alt) if data is None or len(data) else f'<p class="about">{escape(alt)}</p>'
    if data is not None and len(data):
        behind = data_table(data, "The data behind the figure", id)._repr_html_()
        details = f"<details><summary>Data</summary>{behind}</details>"
    return (
        f'<figure class="fig" id="{name}">{drawn}'
        f'<figcaption><span class="caption"><span class="number" data-ref="{name}"></span>'
        f"{escape(numbers.bind(caption))}</span></figcaption>{details}</figure>"
    )


def svg(figure, name: str, alt: str) -> str:
    """Draw a figure as an SVG element: text stays text, equal figures give equal bytes, the page gives the colours."""
    import matplotlib
    from matplotlib import pyplot

    figure = getattr(figure, "figure", figure)  # a seaborn grid holds its figure
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={key: None for key in ("Date", "Creator", "Format", "Type")})
    pyplot.close(figure)  # or the notebook shows it a second time
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, 'DejaVu Sans', sans-serif", text)
    # matplotlib numbers its groups figure_1, axes_1 in every figure: on one page they must differ.
    text = re.sub(r'<g id="[^"]*_\d+">', "<g>", text)
    text = _scope(text, name)
    head, body = text.split(">", 1)
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', head)
    width = f"{float(box[1]) / 11.5:.1f}rem" if box else "30rem"
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {box[0] if box else ""} '
        f'role="img" aria-label="{escape(alt)}" style="width:100%;max-width:{width};height:auto;'
        f'fill:var(--ink, #1b1f24)"><title>{escape(alt)}</title>'
    )
    return opening + themed(body)


def _scope(text: str, name: str) -> str:
    """Prefix every id of an SVG and every reference to it, so that two figures on one page share none."""
    for old in set(re.findall(r'\bid="([^"]+)"', text)):
        text = re.sub(rf'(\bid="|href="#|url\(#){re.escape(old)}(?=["\)])', rf"\g<1>{name}-{old}", text)
    return text


def data_table(frame, caption: str, id: str) -> Table:
    """A data frame as a table; columns of numbers share their decimals."""
    cut = frame.head(DATA_ROWS)
    if len(frame) > DATA_ROWS:
        caption += f" (first {DATA_ROWS} of {len(frame):,} rows)"
    rows = cut.astype(object).values.tolist()
    return replace(table(list(map(str, cut.columns)), rows, caption, f"{id}-data"), numbered=False)


def show_table(columns: Sequence[str | Column], rows: Sequence[Sequence[Any]], caption: str, id: str | None = None):
    """Display a table and return it.

    Args:
        columns: titles, or `Column` where a unit or a group belongs to it. The first column heads its row.
        rows: per row a value per column: text, number, measurement, `Cell` or None (not measured).
        id: names the table; Markdown refers to it by ``[](#table-ID)``. Default: made from the caption.

    Raises:
        UserError: the caption is empty, or a row is as wide as no table of these columns is.
    """
    from IPython.display import display

    if not str(caption).strip():
        raise UserError("show_table: the caption is empty; a table needs one to be understood")
    display(shown := table(columns, rows, caption, id or slug(caption)[:40]))
    return shown


def table(columns: Sequence[str | Column], rows: Sequence[Sequence[Any]], caption: str, id: str) -> Table:
    """What `show_table` displays."""
    for row in rows:
        if len(row) != len(columns):
            raise UserError(f"show_table: a row has {len(row)} values, the table '{id}' {len(columns)} columns")
    heads = [head if isinstance(head, Column) else Column(str(head)) for head in columns]
    filled = []
    for head, values in zip(heads, zip(*rows) if rows else [()] * len(heads)):
        head, cells = _fill(head, list(values))
        filled.append((head, cells))
    return Table([head for head, _ in filled], list(zip(*(cells for _, cells in filled))), caption, id)


def _fill(head: Column, values: list[Any]) -> tuple[Column, list[Cell]]:
    """The cells of a column. Numbers and measurements share unit and decimals; ready cells may stand between these."""
    if any(isinstance(v, dict) for v in values) and all(v is None or isinstance(v, (dict, Cell)) for v in values):
        unit, texts = numbers.column([v for v in values if not isinstance(v, Cell)])
        written = (Cell(text, (interval,)) for text, interval in texts)
        return _numeric(head, unit), [v if isinstance(v, Cell) else next(written) for v in values]
    if values and all(v is None or isinstance(v, dict) or _is_number(v) for v in values):
        if all(v is None or _is_whole(v) for v in values):
            return _numeric(head), [Cell(numbers.ABSENT if v is None else f"{int(v):,}") for v in values]
        _, texts = numbers.column([v if isinstance(v, dict) else {"value": _finite(v)} for v in values])
        return _numeric(head), [Cell(text, (interval,)) for text, interval in texts]
    return head, [v if isinstance(v, Cell) else Cell(_text(v)) for v in values]


def _numeric(head: Column, unit: str = "") -> Column:
    return Column(head.title, head.unit or unit, head.group, numeric=True)


def _is_number(value: Any) -> bool:
    return hasattr(value, "__float__") and not isinstance(value, (str, bool))


def _is_whole(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)


def _finite(value: Any) -> float | None:
    return None if value is None else float(value)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return numbers.write(value)
    return numbers.ABSENT if value is None else str(value)


def summary(result: dict) -> Table:
    """The table of a strategy's measurements: value, interval, n and what the figure depends on, one line each.

    Args:
        result: a result or record, or its measurements alone.
    """
    measurements = result.get("measurements", result)
    name = str(result.get("name") or "this run") if "measurements" in result else "this run"
    rows = []
    for key, m in measurements.items():
        same = key.endswith("_speedup") and numbers.speedup(m) == numbers.SAME
        shown = numbers.SAME if same else numbers.write(m, "value")
        how = "; ".join(str(m[field]) for field in ("method", "conditions") if m.get(field))
        count = numbers.number(m, "n")
        interval = numbers.interval(m)
        rows.append([label(key), shown, interval or "none", "" if count is None else f"{count:,.0f}", how])
    head = [Column("Measurement"), Column("Value"), Column("Interval"), Column("n", numeric=True), Column("How")]
    return table(head, rows, f"Measurements of {name}", "summary")
