"""Ours against outside tools at as many bits: judged by the paired interval, never by the two figures alone."""

import json

import numpy as np
import pytest

from qlib.report.book import collect
from qlib.report.numbers import SAME
from qlib.report.rivals import against, rival_words, rivals_table


def build(tmp_path, make, tools, width=3):
    """Ours has 2.2 nats per token; a tool its own, on documents that vary alike (seed 0) or otherwise."""
    folder = tmp_path / "reference-2" / "cpu"
    make.strategy(folder, "baseline", "baseline", [], 2.0, 9)
    ours = {f"best-int{width}": ("weight_quantization", 2.2, 0)}
    for name, (family, nats, seed) in (ours | {name: ("tool", *found) for name, found in tools.items()}).items():
        make.strategy(folder, name, family, [{"pass": "x"}], nats, 8, spread=0.3, seed=seed)
        file = folder / name / "record.json"
        content = json.loads(file.read_text())
        content["measurements"]["size.bits_per_weight"] = make.number(3.15, "bits")
        file.write_text(json.dumps(content))
    return collect(tmp_path, tmp_path / "none")


@pytest.mark.parametrize(
    "nats, seed, word",
    [(2.21, 0, "better"), (2.19, 0, "worse"), (2.21, 5, SAME), (2.2, 0, SAME)],
)
def test_the_paired_interval_decides(tmp_path, make, nats, seed, word):
    book = build(tmp_path, make, {"tool-x-int3": (nats, seed)})
    ours, ratio, found = against(book, book.get("tool-x-int3"))
    assert ours.name == "best-int3" and found == word
    if seed == 0:  # the same noise on both sides: the ratio is exact
        assert [ratio[end] for end in ("value", "low", "high")] == pytest.approx([np.exp(2.2 - nats)] * 3)
    assert f">{word}<" in rivals_table(book)._repr_html_()
    said = "not measurably different in 1" if word.startswith("no ") else f"{word} in 1"
    assert rival_words(book) == f"Of 1 comparisons, perplexity of ours is {said}."


def test_without_a_partner_nothing_is_judged(tmp_path, make):
    book = build(tmp_path, make, {"tool-x-int3": (2.3, 0)}, width=4)
    assert against(book, book.get("tool-x-int3"))[1:] == (None, "not measured")
    assert "No tool has been compared" in rival_words(book) and "not measured" in rivals_table(book)._repr_html_()
    alone = build(tmp_path / "alone", make, {})
    assert rivals_table(alone) is None and "No tool has been compared" in rival_words(alone)
