"""What makes a converted notebook one document: contents, anchors, numbers of figures and tables, references."""

import re
from html import escape, unescape

from qlib.errors import UserError, nearest
from qlib.report.html import slug

__all__ = ["finish", "scope_ids"]

HEADING = re.compile(r"<h([1-6])([^>]*)>(.*?)</h\1>", re.DOTALL)
NUMBER = re.compile(r'<span class="number" data-ref="((fig|table)-[^"]+)"></span>')
REFERENCE = re.compile(r'<a href="#([^"]+)"></a>')
TABLE = re.compile(r"(?P<wrap><div class=\"scroll[^>]*>)?<table(?P<attrs>[^>]*)>(?P<inner>.*?)</table>", re.DOTALL)
KINDS = {"fig": "Figure", "table": "Table"}


def finish(page: str, where: str, partial: bool = False) -> str:
    """Complete a page: heading anchors, contents (at ``<!--contents-->``), table headers, numbers and references.

    Args:
        where: names the notebook in messages.
        partial: the notebook stopped half-way, so that a reference may lead to what was not reached.

    Raises:
        UserError: a reference ``[](#name)`` leads to no figure, table or heading of the page.
    """
    page, headings = _anchor(page)
    page = _complete_tables(page)
    page, targets = _number(page)
    targets = {name: escape(text) for _, name, text in headings} | targets
    page = REFERENCE.sub(lambda match: _refer(match, targets, where, partial), page)
    return page.replace("<!--contents-->", _contents(headings), 1)


def scope_ids(html: str, prefix: str) -> str:
    """Give all ids of a fragment, and all references to them, a name of their own, so that fragments share a page.

    ``fig-layers`` of ``gptq-int4`` becomes ``fig-gptq-int4-layers``.
    """
    ids = set(re.findall(r'\bid="([^"]+)"', html))
    pattern = re.compile(r'(\bid="|\bdata-ref="|\bhref="#|\baria-labelledby="|url\(#)([^")]+)(?=["\)])')


    def rename(match: re.Match) -> str:
        kind, dash, rest = match[2].partition("-")
        own = f"{kind}-{prefix}-{rest}" if dash and kind in KINDS else f"{prefix}-{match[2]}"
        return match[1] + own if match[2] in ids else match[0]

    return pattern.sub(rename, html) if ids else html


def _text(html: str) -> str:
    return unescape(re.sub(r"<[^>]+>", "", html)).strip()


def _anchor(page: str) -> tuple[str, list[tuple[int, str, str]]]:
    """Give every heading an id and a link to itself; return level, id and text of each."""
    headings: list[tuple[int, str, str]] = []
    used: set[str] = set(re.findall(r'\bid="([^"]+)"', page))

    def link(match: re.Match) -> str:
        level, attributes, inner = int(match[1]), match[2], match[3]
        own = re.search(r'\bid="([^"]+)"', attributes)
        name = own[1] if own else slug(_text(inner))
        if not own:
            base, count = name, 1
            while name in used:
                name, count = f"{base}-{count + 1}", count + 1
            used.add(name)
            attributes += f' id="{name}"'
        headings.append((level, name, _text(re.sub(r'<span class="note".*?</span>', "", inner))))
        if level == 1:
            return f"<h1{attributes}>{inner}</h1>"
        label = escape(f"Link to {headings[-1][2]}")
        return f'<h{level}{attributes}>{inner} <a class="anchor" href="#{name}" aria-label="{label}">#</a></h{level}>'

    return HEADING.sub(link, page), headings


def _complete_tables(page: str) -> str:
    """Scope, caption and a scrolling frame for tables that came without: data frames and Markdown tables."""

    def complete(match: re.Match) -> str:
        inner = match["inner"]
        head, found, rest = inner.partition("</thead>")
        if not found:  # the first row heads the columns
            head, found, rest = inner.partition("</tr>")
        for name in ("col", "row"):
            part = re.sub(r"<th(?![a-z])(?![^>]*\bscope=)", f'<th scope="{name}"', head if name == "col" else rest)
            head, rest = (part, rest) if name == "col" else (head, part)
        inner = head + found + rest
        if match["wrap"] and "<caption" in inner:
            return f"{match['wrap']}<table{match['attrs']}>{inner}</table>"
        above = [m for m in HEADING.finditer(page, 0, match.start())]
        label = escape(f"Table in the section {_text(above[-1][3]).rstrip('# ')}" if above else "Table")
        if "<caption" not in inner:
            inner = f'<caption class="unseen">{label}</caption>{inner}'
        table = f"<table{match['attrs']}>{inner}</table>"
        return f'<div class="scroll" role="region" aria-label="{label}" tabindex="0">{table}</div>'

    return TABLE.sub(complete, page)


def _number(page: str) -> tuple[str, dict[str, str]]:
    """Number figures and tables in the order of the page; return what each is called."""
    names: dict[str, str] = {}
    counts = {"fig": 0, "table": 0}

    def count(match: re.Match) -> str:
        counts[match[2]] += 1
        names[match[1]] = f"{KINDS[match[2]]} {counts[match[2]]}"
        return f'<span class="number">{names[match[1]]}.</span> '

    return NUMBER.sub(count, page), names


def _refer(match: re.Match, targets: dict[str, str], where: str, partial: bool) -> str:
    if match[1] not in targets and partial:
        return "what this run did not reach"
    if match[1] not in targets:
        close = nearest(match[1], targets)
        raise UserError(f"{where}: reference '#{match[1]}' leads to no figure, table or heading{close}")
    return f'<a href="#{match[1]}">{targets[match[1]]}</a>'


def _contents(headings: list[tuple[int, str, str]]) -> str:
    """Nested lists of the h2 and h3."""
    items: list[list] = []
    for level, name, text in headings:
        link = f'<a href="#{name}">{escape(text)}</a>'
        if level == 2:
            items.append([link, []])
        elif level == 3 and items:
            items[-1][1].append(f"<li>{link}</li>")
    lists = (f"<li>{link}<ol>{''.join(below)}</ol></li>" if below else f"<li>{link}</li>" for link, below in items)
    return f"<ol>{''.join(lists)}</ol>"
