"""What is published: complete, offline, measured on the shipped model, and free of the paths of any machine."""

import json
from pathlib import Path

import numpy as np
import pytest

from qlib.data.corpus import manifest_hash
from qlib.report.check import check_html
from qlib.train.acceptance import BAND

PUBLISHED = Path(__file__).parents[1] / "reports" / "published"
RECORDS = {folder.name: json.loads((folder / "record.json").read_text()) for folder in (PUBLISHED / "records").iterdir()}
STRATEGIES = ("baseline", "rtn-int8", "rtn-int4")


@pytest.mark.parametrize("page", sorted(PUBLISHED.rglob("*.html")), ids=lambda page: page.stem)
def test_pages_need_no_network_and_have_no_defects(page):
    assert check_html(page) == []


def test_no_text_names_a_path_of_the_machine():
    for file in (file for kind in ("*.html", "*.json") for file in PUBLISHED.rglob(kind)):
        text = file.read_text(encoding="utf-8")
        assert not any(word in text for word in ("/home/", f"{Path.home()}/", "/tmp/", "site-packages")), file


@pytest.mark.parametrize("name", STRATEGIES)
def test_figures_can_be_computed_again_from_the_items(name):
    record = RECORDS[name]
    with np.load(PUBLISHED / "records" / name / "items.npz", allow_pickle=False) as items:
        nats = items["document_nll"].sum() / items["document_tokens"].sum()
        gain = items["item_inside"] - items["item_alone"]
        levels = record["details"]["levels"]
        for index, level in enumerate(levels):
            right = (gain[:, 0] > gain[:, 1:].max(axis=1))[items["item_level"] == index]
            assert len(right) == level["n"] and 100 * right.mean() == pytest.approx(level["value"], abs=0.3)
    assert record["measurements"]["quality.perplexity"]["value"] == pytest.approx(np.exp(nats))
    assert record["data_sha256"] == manifest_hash()
    assert sum(level["n"] for level in levels) >= 3000


def test_the_baseline_lies_in_its_band_and_eight_bits_within_the_noise():
    assert BAND[0] < RECORDS["baseline"]["measurements"]["quality.accuracy"]["value"] < BAND[1]
    eight, four = (RECORDS[name]["measurements"] for name in ("rtn-int8", "rtn-int4"))
    assert eight["quality.accuracy_delta"]["low"] <= 0 <= eight["quality.accuracy_delta"]["high"]
    assert eight["quality.kl"]["high"] < four["quality.kl"]["low"]
    assert four["size.disk_bytes"]["value"] < eight["size.disk_bytes"]["value"]


def test_at_the_true_shape_fewer_bits_decode_faster():
    formats = RECORDS["speed-qwen-72b"]["formats"]
    assert formats["int4-g128"]["latency.decode_speedup"]["low"] > 1
    for measured in formats.values():
        assert 0 < measured["latency.roofline_fraction"]["value"] <= 1.1
