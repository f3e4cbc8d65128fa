"""Our best recipe at 8, 4, 3 and 2 bits against every tool on the reference model: perplexity, paired by documents."""

from pathlib import Path

import numpy as np

from qlib.bench.rows import Row, judge, missing
from qlib.params import load_strategies
from qlib.report.book import Entry, collect
from qlib.report.league import OURS, SAME, beside
from qlib.report.numbers import number
from qlib.report.pairs import interval_of, together

__all__ = ["measure"]


def measure(root: Path) -> list[Row]:
    """One row for each strategy of a tool, from the records of this machine, else the published ones.

    Ours must not be measurably worse, and at 3 and 2 bits measurably better, with at most the tool's bits per weight: of
    our recipes of the width, the largest that takes no more.
    """
    entries = {one.name: one for one in collect(root / "reports" / "runs", root / "reports" / "published").strategies}
    strategies = load_strategies(sorted((root / "params").glob("tool-*.yaml")), root)
    rows = [(one.recipe[0]["bits"], one.name) for one in strategies]
    return [_row(bits, name, entries) for bits, name in sorted(rows, key=lambda row: (-row[0], row[1]))]


def _row(bits: int, name: str, entries: dict[str, Entry]) -> Row:
    known, tool = [entries[one] for one in OURS[bits] if one in entries], entries.get(name)
    rival = beside(known, tool) if known and tool else None
    ours = rival.name if rival else OURS[bits][0]
    what, target = f"perplexity of {ours} over {name}", "not above 1" if bits >= 4 else "<= 1"
    pair = [entries.get(ours), tool]
    samples = together([entries.get("baseline"), *pair]) if all(pair) else None
    if samples is None:
        lacking = next((one for one, entry in zip((ours, name), pair) if not entry or not entry.measurements), name)
        return missing(what, target, "ratio", f"no figures; qlib run {lacking}")
    ratio = interval_of(np.exp(samples[1].nats - samples[2].nats), "ratio", samples[1].documents)
    spent = [number(entry.measure("size.bits_per_weight")) for entry in pair]
    how = f"{spent[0]:.3f} against {spent[1]:.3f} bits per weight; {samples[1].documents} documents"
    row = judge(what, target, (ratio["value"], ratio["low"], ratio["high"]), "ratio", how)
    return row if spent[0] <= spent[1] + SAME else missing(what, target, "ratio", f"ours takes more bits: {how}")
