"""The book: every run found under a folder, in the report's order, with published records where nothing was run."""

import json
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Callable

from qlib.errors import UserError, nearest
from qlib.paths import slug
from qlib.report.bench import BENCH, read_bench
from qlib.report.html import slug as html_slug
from qlib.report.measures import FAMILIES
from qlib.report.numbers import ABSENT, keeps, number
from qlib.runs.join import shape_figures

__all__ = ["Entry", "Book", "collect", "sources", "SPEED_MODEL", "FAILED"]

SPEED_MODEL = "qwen-72b"  # the true shape that the report's headline figures are about
FAILED = ("failed", "crashed", "timeout", "interrupted")
APART = ("speed", "training", "scale", "reference", "report", "lesson")  # families that are no strategies


@dataclass(frozen=True)
class Entry:
    """A run or a published record of one strategy on one model and one device.

    Attributes:
        state: done, failed, crashed, timeout, interrupted, running, unverified (a result without a key) or published.
        record: what it measured, empty if nothing. A failed rerun keeps the record of the run before it.
        folder: where its files are.
    """

    name: str
    family: str
    state: str
    model: str
    device: str
    folder: Path
    record: dict = field(default_factory=dict)
    status: dict = field(default_factory=dict)
    params: dict = field(default_factory=dict)

    @property
    def title(self) -> str:
        titles = self.record.get("title") or self.params.get("title")
        return str((titles or {}).get("en") or self.name) if isinstance(titles, dict) else str(titles or self.name)

    @property
    def tier(self) -> str:
        return str(self.record.get("tier") or self.params.get("tier") or "core")

    @property
    def failed(self) -> bool:
        return self.state in FAILED

    @property
    def label(self) -> str:
        """The state in words that leave no doubt whose figures stand beside it."""
        words = {"published": "published record", "unverified": "unverified result"}
        word = words.get(self.state, self.state)
        return f"{word}, figures of an earlier run" if self.failed and self.measurements else word

    @property
    def measurements(self) -> dict[str, dict]:
        return self.record.get("measurements") or {}

    def measure(self, name: str) -> dict | None:
        return self.measurements.get(name)

    @property
    def notebook(self) -> Path | None:
        """The executed notebook; of a failed run the one that stopped half-way."""
        halfway = [self.folder / "failed.ipynb"] if self.failed else []
        return next((file for file in (*halfway, self.folder / "notebook.ipynb") if file.is_file()), None)

    @property
    def kept_page(self) -> Path | None:
        """The page of a published record's executed notebook, which itself is not kept."""
        file = self.folder.parents[1] / "notebooks" / f"{html_slug(self.name)}.html"
        return file if self.state == "published" and self.folder.name == self.name and file.is_file() else None

    @property
    def order(self) -> tuple:
        """Baseline first, then by family, then from many bits to few and from large to small."""
        families = list(FAMILIES)
        family = families.index(self.family) if self.family in families else len(families)
        bits = number(self.measure("size.bits_per_weight") or self.measure("size.bits_per_weight_total"))
        size = number(self.measure("size.disk_bytes"))
        return (family, bits is None, -(bits or 0), -(size or 0), self.name, self.device != "cpu", self.device)


@dataclass(frozen=True)
class Book:
    """All entries in order. `strategies` are the rows of the report, `speed` the records of true shapes.

    Quick checks (tier smoke) are rows only where a model has no others: their figures mean nothing.

    Attributes:
        known: names of all strategy files.
        bench: rows of the benchmarks side by side with other tools.
    """

    entries: tuple[Entry, ...]
    known: frozenset[str] = frozenset()
    bench: tuple[dict, ...] = ()

    @cached_property
    def strategies(self) -> tuple[Entry, ...]:
        rows = [e for e in self.entries if e.family not in APART]
        real = {e.model for e in rows if e.tier != "smoke"}
        return tuple(e for e in rows if e.tier != "smoke" or e.model not in real)

    @cached_property
    def speed(self) -> dict[str, dict[str, Entry]]:
        """Speed records by model and device; the headline shape first."""
        found: dict[str, dict[str, Entry]] = {}
        for entry in sorted(self.entries, key=lambda e: (e.model != SPEED_MODEL, e.model, e.order)):
            if entry.family == "speed" and entry.record.get("formats"):
                found.setdefault(entry.model, {})[entry.device] = entry
        return found

    @property
    def training(self) -> Entry | None:
        """The record of training in several precisions, if there is one; a quick check only where there is no other."""
        found = [e for e in self.entries if e.family == "training" and e.record.get("formats")]
        return min(found, key=lambda e: (e.tier == "smoke", e.order), default=None)

    @property
    def scale(self) -> Entry | None:
        """The record of one layer of a true shape by every method, of the largest shape that was measured."""
        found = [e for e in self.entries if e.family == "scale" and e.record.get("formats")]
        return max(found, key=lambda e: (e.model == SPEED_MODEL, e.state != "published", e.name), default=None)

    @cached_property
    def models(self) -> list[str]:
        """Quality subjects, the reference model first."""
        names = {e.model for e in self.strategies}
        return sorted(names, key=lambda name: (not name.startswith("reference-"), name))

    @property
    def failures(self) -> tuple[Entry, ...]:
        return tuple(e for e in self.entries if e.failed)

    def of(self, model: str | None = None, family: str | None = None) -> list[Entry]:
        """The strategies of a model (default: the first) and, if given, of a family."""
        model = model or next(iter(self.models), None)
        return [e for e in self.strategies if e.model == model and family in (None, e.family)]

    def part(self, keep: Callable[[Entry], bool]) -> "Book":
        """The book with fewer strategies; everything else stays."""
        return replace(self, entries=tuple(e for e in self.entries if e.family in APART or keep(e)))

    def baseline(self, like: Entry) -> Entry | None:
        """The baseline that `like` is compared with: same model, and same protocol and device where there is one."""
        found = [e for e in self.strategies if e.family == "baseline" and e.model == like.model and e.measurements]
        protocol = like.record.get("protocol")
        found.sort(key=lambda e: (e.record.get("protocol") != protocol, e.device != like.device))
        return next(iter(found), None)

    def gate(self, entry: Entry) -> str:
        """``yes``, ``no`` or ``not resolved``: does the strategy keep 99 % of the baseline's accuracy?"""
        accuracy, delta = (entry.measure(f"quality.{name}") for name in ("accuracy", "accuracy_delta"))
        if number(accuracy) is None or number(delta) is None:
            return ABSENT
        return keeps(delta, {"value": number(accuracy) - number(delta)})  # of the baseline, on the very same items

    def shape(self, entry: Entry, model: str = SPEED_MODEL, device: str | None = None) -> dict[str, dict]:
        """The measurements of the entry's number format, or mix, at a true shape; empty where none apply."""
        records = self.speed.get(model, {})
        speed = records.get(device or entry.device)
        return shape_figures(entry.record, speed.record) if speed else {}

    def anchor(self, entry: Entry) -> str:
        """The id of an entry's section, and the name of its page; twins on other models or devices get longer ones."""
        first = next(e for e in self.entries if e.name == entry.name)
        name = entry.name if entry is first else f"{entry.name}-{entry.model}-{entry.device}"
        return f"strategy-{html_slug(name)}"

    def page(self, entry: Entry) -> str:
        """The entry's executed notebook as a page beside the report, or an empty string where there is none."""
        there = entry.notebook or entry.kept_page
        return f"notebooks/{self.anchor(entry).removeprefix('strategy-')}.html" if there else ""

    def get(self, name: str) -> Entry | None:
        """The entry of that name (one with measurements before one without), None if it is known but never ran.

        Raises:
            UserError: no strategy is called so.
        """
        found = [e for e in self.entries if e.name == name]
        names = {e.name for e in self.entries} | self.known
        if not found and name not in names:
            raise UserError(f"strategy '{name}' is unknown{nearest(name, names)}")
        found.sort(key=lambda e: not e.record)
        return next(iter(found), None)


def sources(runs: Path, published: Path) -> list[Path]:
    """Every file a book is made from; the report's cache key hashes them."""
    runs, published = Path(runs), Path(published)
    files = [p for name in ("record", "status", "result") for p in runs.glob(f"*/*/*/{name}.json")]
    files = [p for p in files if p.relative_to(runs).parts[0] != "cache"]
    return sorted(files) + sorted(published.glob("records/**/record.json")) + list(published.parent.glob(BENCH))


def collect(runs: str | Path, published: str | Path, params: str | Path | None = None) -> Book:
    """Read all runs, and published records of what was not run here.

    Args:
        runs: folder of ``<model>/<device>/<strategy>/``.
        published: folder of ``records/<strategy>/record.json``; beside it lies what `qlib bench` wrote.
        params: folder of strategy files; names, families and recipes of strategies that left no record.
    """
    files = sources(Path(runs), Path(published))
    plans = _plans(Path(params)) if params else {}
    entries: dict[tuple[str, str, str], Entry] = {}
    for folder in sorted({p.parent for p in files if p.is_relative_to(runs)}):
        entry = _run(folder, plans)
        entries[entry.model, entry.device, entry.name] = entry
    for file in (p for p in files if not p.is_relative_to(runs) and p.name == "record.json"):
        record, _ = _read(file)
        if record:
            names = (slug(str(record.get("model") or "unknown")), str(record.get("device") or "cpu"), file.parent.name)
            entry = _entry(file.parent, "published", record, {}, plans, names)
            entries.setdefault((entry.model, entry.device, entry.name), entry)
    bench = read_bench(Path(published).parent / BENCH)
    return Book(tuple(sorted(entries.values(), key=lambda e: e.order)), frozenset(plans), bench)


def _run(folder: Path, plans: dict[str, dict]) -> Entry:
    (record, trouble), (result, _) = _read(folder / "record.json"), _read(folder / "result.json")
    status, _ = _read(folder / "status.json")
    state = str(status.get("state") or "")
    if trouble:
        state, status = "failed", {**status, "cause": trouble}
    elif state == "running" and not _alive(folder):
        finished = record and (record.get("provenance") or {}).get("started") == status.get("started")
        state, status = ("done", status) if finished else ("crashed", {**status, "cause": "the runner was killed"})
    elif state not in (*FAILED, "running"):
        state = "done" if record else "unverified" if result else "interrupted"
    return _entry(folder, state, record or ({} if state in FAILED else result), status, plans, folder.parts[-3:])


def _alive(folder: Path) -> bool:
    from qlib.runs.state import is_held

    return is_held(folder)


def _entry(folder: Path, state: str, record: dict, status: dict, plans: dict, names: tuple[str, ...]) -> Entry:
    model, device, name = names
    name = str(record.get("name") or name)
    params = record.get("params") or plans.get(name, {})
    kind = next((kind for kind in APART if name.startswith(f"{kind}-")), "other")
    family = str(record.get("family") or params.get("family") or kind)
    return Entry(name, family, state, model, device, folder, record, status, params)


def _read(file: Path) -> tuple[dict[str, Any], str]:
    """A JSON object and an empty string; or nothing, and what is wrong with the file if there is one."""
    if not file.is_file():
        return {}, ""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        return {}, f"{file.name} cannot be read: {error}"
    return (content, "") if isinstance(content, dict) else ({}, f"{file.name} does not hold an object")


def _plans(folder: Path) -> dict[str, dict]:
    """Strategy files by name. Read leniently: a faulty one is the runner's to refuse."""
    import yaml

    plans = {}
    for file in sorted(folder.glob("*.yaml")):
        try:
            plan = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, OSError):
            continue
        if isinstance(plan, dict):
            plans[str(plan.get("name") or file.stem)] = plan
    return plans
