"""What a page of the report must never be: dependent on the network, mute for a screen reader, or half filled in."""

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

__all__ = ["check_html"]

#: Attributes that make a browser fetch something.
FETCHES = {
    "script": ("src",),
    "link": ("href",),
    "img": ("src", "srcset"),
    "source": ("src", "srcset"),
    "iframe": ("src",),
    "video": ("src", "poster"),
    "audio": ("src",),
    "embed": ("src",),
    "object": ("data",),
    "use": ("href", "xlink:href"),
    "image": ("href", "xlink:href"),
    "body": ("background",),
}
NO_ALT = ("", "no description has been provided for this image")
RAW = ("pre", "code", "script", "style", "textarea")  # where two braces mean nothing


def check_html(path: str | Path) -> list[str]:
    """List what is wrong with a page, one line each; an empty list if nothing is.

    Found are: resources from elsewhere, ``@import``, images without alternative text, headers without scope, tables
    without caption, a number of h1 other than one, placeholders left over, ids used twice, links into nothing, and a
    missing language or title.
    """
    path = Path(path)
    page = _Page()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    return page.problems + page.unfinished() + _dead_links(page.links, page.ids, path)


def _dead_links(links: list[str], ids: dict[str, int], path: Path) -> list[str]:
    problems = []
    for link in dict.fromkeys(links):
        parts = urlsplit(link)
        if parts.scheme in ("http", "https", "mailto"):
            continue
        if parts.scheme:
            problems.append(f"link to '{link}' runs or opens something that is no page")
        elif parts.path and not (path.parent / unquote(parts.path)).exists():
            problems.append(f"link to '{link}' leads to no file")
        elif not parts.path and parts.fragment and unquote(parts.fragment) not in ids:
            problems.append(f"link to '{link}' leads nowhere on the page")
    return problems


class _Page(HTMLParser):
    """Reads a page once and collects problems, ids and links."""

    def __init__(self) -> None:
        super().__init__()
        self.problems: list[str] = []
        self.ids: dict[str, int] = {}
        self.links: list[str] = []
        self.counts = {"h1": 0, "title": 0, "table": 0, "caption": 0}
        self.language = False
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self._count(tag, found)
        self._fetches(tag, found)
        self._names(tag, found)
        if tag in RAW:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            del self.open[len(self.open) - 1 - self.open[::-1].index(tag) :]

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            self._style(data)
        if not self.open and (left := re.search(r"\{\{.{0,60}|\{%.{0,60}", data)):
            self.problems.append(f"placeholder left over: {left[0].strip()}")

    def _count(self, tag: str, found: dict[str, str]) -> None:
        if tag in self.counts and not (tag == "title" and self.counts["title"]):
            self.counts[tag] += 1
        if tag == "html":
            self.language = bool(found.get("lang"))
        if "id" in found:
            self.ids[found["id"]] = self.ids.get(found["id"], 0) + 1
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])

    def _fetches(self, tag: str, found: dict[str, str]) -> None:
        for name in FETCHES.get(tag, ()):
            if found.get(name) and not found[name].strip().startswith(("data:", "#")):
                self.problems.append(f"<{tag} {name}> fetches '{found[name][:80]}'")
        if tag == "meta" and found.get("http-equiv", "").lower() == "refresh":
            self.problems.append("<meta http-equiv=refresh> leaves the page")
        self._style(found.get("style", ""))

    def _style(self, text: str) -> None:
        if "@import" in text:
            self.problems.append("style: @import fetches a style sheet")
        for target in re.findall(r"url\(\s*['\"]?([^'\")]*)", text):
            if not target.startswith(("data:", "#")):
                self.problems.append(f"style: url({target[:80]}) fetches something")

    def _names(self, tag: str, found: dict[str, str]) -> None:
        """Images and headers must say what they are."""
        hidden = found.get("aria-hidden") == "true" or found.get("role") == "presentation"
        if tag == "img" and not hidden and found.get("alt", "").strip().lower() in NO_ALT:
            self.problems.append(f"<img> without alternative text: {found.get('src', '')[:40]}")
        if tag == "svg" and not hidden and not (found.get("role") == "img" and found.get("aria-label", "").strip()):
            self.problems.append("<svg> without role=img and aria-label")
        if tag == "th" and found.get("scope") not in ("col", "row", "colgroup", "rowgroup"):
            self.problems.append("<th> without scope")

    def unfinished(self) -> list[str]:
        """What only the whole page shows."""
        problems = [f"id '{name}' is used {count} times" for name, count in self.ids.items() if count > 1]
        if self.counts["h1"] != 1:
            problems.append(f"{self.counts['h1']} h1 instead of one")
        mute = self.counts["table"] - self.counts["caption"]
        if mute > 0:
            problems.append(f"{mute} of {self.counts['table']} tables without caption")
        if not self.language:
            problems.append("<html> without lang")
        if not self.counts["title"]:
            problems.append("page without <title>")
        return problems
