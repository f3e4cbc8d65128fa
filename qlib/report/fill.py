"""Placeholders in Markdown cells: ``{{ quality.perplexity }}`` becomes the record's value, interval and unit.

In a strategy's notebook a placeholder names a measurement, or one of its fields (``{{ quality.kl.value }}``). In the
report it names the strategy first (``{{ rtn-int4: quality.perplexity }}``), and of a record that holds several formats
the format too (``{{ speed-qwen-72b: int4-g128.latency.decode_ms }}``); so does a lesson, which measures nothing
itself. A measurement that is missing because a strategy failed reads "not measured"; a name that does not exist is an
error.
"""

import re
from typing import Callable

from qlib.errors import UserError, nearest
from qlib.progress import clock
from qlib.report import numbers, words
from qlib.report.bench import bench_words
from qlib.report.book import Book, Entry
from qlib.report.either import either_words
from qlib.report.headline import headline_frame, headline_words
from qlib.report.league import league_words
from qlib.report.measures import FAMILIES, FIELDS, MEASURES
from qlib.report.quantized import METHODS, method_words
from qlib.report.scale_frames import SENTENCES as TRUE_SHAPE
from qlib.report.scale_frames import sentence

__all__ = ["fill", "escape", "entry_words", "book_words", "lesson_words"]

PLACEHOLDER = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
FORMATS = ("speed", "training", "scale")  # families whose records hold several formats side by side
ASKED = (*FIELDS, "interval")
ABOUT = ("name", "title", "model", "device", "protocol", "state", "duration", "peak_memory", "commit", "parameters")
SENTENCES: dict[str, Callable[[Book], str]] = {
    "finding": words.finding,
    "article": words.article_verdict,
    "headline": lambda book: headline_words(headline_frame(book)),
    "failures": words.failure_words,
    "recovery": words.recovery_words,
    "precision": words.precision_words,
    "ablation": words.ablation_words,
    "either": either_words,
    "literature": words.literature_words,
    "league": league_words,
    "bench": lambda book: bench_words(book.bench),
}


def fill(text: str, resolve: Callable[[str], str], where: str) -> str:
    """Replace every placeholder of a Markdown text; values are escaped for Markdown and HTML.

    Args:
        resolve: turns what stands between the braces into plain text.
        where: notebook and cell, for the error message.

    Raises:
        UserError: a placeholder is unknown.
    """

    def value(match: re.Match) -> str:
        try:
            return escape(numbers.bind(resolve(match[1].strip())))
        except UserError as error:
            raise UserError(f"{where}: placeholder '{{{{ {match[1].strip()} }}}}': {error}") from None

    return PLACEHOLDER.sub(value, text)


def escape(text: str) -> str:
    """Write what Markdown or HTML could read as markup as character references."""
    return re.sub(r"[\\`*_{}\[\]<>&\"'|$~#!]", lambda match: f"&#{ord(match[0])};", text)


def entry_words(entry: Entry | None) -> Callable[[str], str]:
    """Resolve placeholders of one strategy's notebook from its record; None: it has none."""

    def resolve(name: str) -> str:
        if name in ABOUT:
            return _about(entry, name)
        if entry and entry.family == "scale" and name in TRUE_SHAPE:
            return sentence(name, entry.record)
        if entry and entry.family in FORMATS:
            return _format(entry, name)
        return _measurement(entry.measurements if entry else {}, name)

    return resolve


def book_words(book: Book) -> Callable[[str], str]:
    """Resolve placeholders of the report: ``finding``, ``verdict: NAME``, ``methods: GROUP``, ``NAME: measurement``, ..."""

    def resolve(name: str) -> str:
        scope, colon, path = (part.strip() for part in name.partition(":"))
        if not colon:
            if scope in SENTENCES:
                return SENTENCES[scope](book)
            scopes = "verdict: NAME, family: NAME, methods: GROUP, true shape: SENTENCE, NAME: measurement"
            allowed = f"{', '.join(SENTENCES)}, {scopes}"
            raise UserError(f"unknown{nearest(scope, SENTENCES)}; allowed: {allowed}")
        if scope == "verdict":
            return words.verdict(book, book.get(path))
        if scope == "family":
            return words.family_words(book, _known(path, FAMILIES))
        if scope == "methods":
            return method_words(book, _known(path, METHODS))
        if scope == "true shape":
            return sentence(_known(path, TRUE_SHAPE), book.scale.record if book.scale else None)
        entry = book.get(scope)
        if path in ABOUT:
            return _about(entry, path)
        if (entry and entry.family in FORMATS) or scope.startswith(FORMATS):
            return _format(entry, path)
        return _measurement(entry.measurements if entry else {}, path)

    return resolve


def lesson_words(book: Book, entry: Entry) -> Callable[[str], str]:
    """Resolve placeholders of a lesson: facts about its own run (``duration``), else as in the report."""
    named = book_words(book)
    return lambda name: _about(entry, name) if name in ABOUT else named(name)


def _measurement(measurements: dict[str, dict], path: str) -> str:
    name, asked = path, None
    if path not in measurements and path.rpartition(".")[2] in ASKED:
        name, _, asked = path.rpartition(".")
    if name not in measurements and name not in MEASURES:
        raise UserError(f"unknown{nearest(name, [*measurements, *MEASURES, *ABOUT])}")
    if name.endswith("_speedup") and asked is None:
        return numbers.speedup(measurements.get(name))
    return numbers.write(measurements.get(name), asked)


def _known(name: str, names) -> str:
    if name not in names:
        raise UserError(f"unknown{nearest(name, names)}; allowed: {', '.join(names)}")
    return name


def _format(entry: Entry | None, path: str) -> str:
    """``int4-g128.latency.decode_ms``: the format's name ends where a measurement's begins."""
    match = re.match(r"(.+?)\.((?:latency|size|compress|energy|train|quality)\..+)", path)
    if not match:
        raise UserError("this record is asked for a format and a measurement, as in int4-g128.latency.decode_ms")
    formats = (entry.record.get("formats") or {}) if entry else {}
    if formats and match[1] not in formats:
        raise UserError(f"format '{match[1]}' is unknown{nearest(match[1], formats)}; measured: {', '.join(formats)}")
    return _measurement(formats.get(match[1], {}), match[2])


def _about(entry: Entry | None, name: str) -> str:
    """A fact about the run itself."""
    if entry is None:
        return numbers.ABSENT
    record = entry.record
    seconds = numbers.number({"value": record.get("duration_seconds")})
    memory = record.get("peak_memory_bytes")
    peak = {"value": memory.get("value"), "unit": "bytes"} if isinstance(memory, dict) else None
    parameters = numbers.number({"value": (record.get("subject") or {}).get("parameters")})
    facts = {
        "name": entry.name,
        "title": entry.title,
        "model": entry.model,
        "device": entry.device,
        "state": entry.label,
        "protocol": record.get("protocol"),
        "duration": clock(seconds) if seconds is not None else None,
        "peak_memory": numbers.write(peak),
        "commit": (record.get("provenance") or {}).get("commit"),
        "parameters": f"{parameters:,.0f}" if parameters else None,
    }
    return str(facts[name] or numbers.ABSENT)
