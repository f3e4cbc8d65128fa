"""Rows of quality: what is compared, at how many bits, and what is said where there is nothing to compare."""

import json
from pathlib import Path

import numpy as np
import pytest

from qlib.bench.bench_quality import measure

ROOT = Path(__file__).parents[2]
DOCUMENTS, TOKENS = 20, 50


def write(root: Path, name: str, nats: float, bits: float) -> None:
    """A record whose perplexity is exp(nats) in every document."""
    folder = root / "reports" / "runs" / "reference-2" / "cpu" / name
    folder.mkdir(parents=True)
    values = {"quality.accuracy": 90.0, "quality.perplexity": float(np.exp(nats)), "size.bits_per_weight": bits}
    record = {"name": name, "family": "tool", "tier": "full", "model": "reference-2", "device": "cpu", "key": "0"}
    record |= {"params": {"name": name, "seed": 0}, "measurements": {key: {"value": x} for key, x in values.items()}}
    (folder / "record.json").write_text(json.dumps(record))
    (folder / "status.json").write_text('{"state": "done"}')
    items = {"item_document": np.arange(DOCUMENTS), "item_level": np.zeros(DOCUMENTS, int)}
    items |= {"item_inside": np.eye(4)[np.zeros(DOCUMENTS, int)], "item_alone": np.zeros((DOCUMENTS, 4))}
    items |= {"document_nll": np.full(DOCUMENTS, TOKENS * nats), "document_tokens": np.full(DOCUMENTS, TOKENS)}
    np.savez(folder / "items.npz", **items)


@pytest.fixture
def project(tmp_path):
    for folder in ("params", "notebooks"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    write(tmp_path, "baseline", 1.8, 16.0)
    write(tmp_path, "best-int4", 1.9, 4.156)
    write(tmp_path, "tool-llama-cpp-iq4_nl", 2.0, 4.5)
    write(tmp_path, "tool-gptqmodel-int4", 1.85, 4.0)
    return tmp_path


def test_every_tool_is_a_row_from_many_bits_to_few(project):
    rows = {row.name: row for row in measure(project)}
    assert len(rows) == len(list((ROOT / "params").glob("tool-*.yaml")))
    widths = [int(name.partition("-int")[2][0]) for name in rows]  # "perplexity of best-int4 over ..."
    assert widths == sorted(widths, reverse=True) and set(widths) == {8, 4, 3, 2}
    row = rows["perplexity of best-int4 over tool-llama-cpp-iq4_nl"]
    assert row.measured == pytest.approx(np.exp(-0.1)) and row.met
    assert row.how == "4.156 against 4.500 bits per weight; 20 documents"


def test_a_larger_type_is_held_against_a_larger_recipe(project):
    """Of ours at 3 bits the largest that takes no more bits than the tool."""
    write(project, "best-int3", 2.0, 3.148)
    write(project, "best-3.7-bits", 1.9, 3.86)
    for name, bits in (("q3_k_m", 3.895), ("iq3_s", 3.4375)):
        write(project, f"tool-llama-cpp-{name}", 1.95, bits)
    rows = {row.name: row for row in measure(project)}
    assert rows["perplexity of best-3.7-bits over tool-llama-cpp-q3_k_m"].measured == pytest.approx(np.exp(-0.05))
    assert rows["perplexity of best-int3 over tool-llama-cpp-iq3_s"].measured == pytest.approx(np.exp(0.05))


def test_what_cannot_be_compared_says_why(project):
    rows = {row.name: row for row in measure(project)}
    row = rows["perplexity of best-int4 over tool-gptqmodel-int4"]
    assert row.measured is None and row.how.startswith("not measured: ours takes more bits: 4.156 against 4.000")
    row = rows["perplexity of best-int2 over tool-llama-cpp-q2_0"]
    assert row.how == "not measured: no figures; qlib run best-int2"
