"""Published orders are compared with ours by paired intervals; published ratios follow from published numbers."""

import numpy as np
import pytest

from qlib.report import words
from qlib.report.book import collect
from qlib.report.literature import PUBLISHED, compared, literature_table

GPTQ = next(claim for claim in PUBLISHED if claim.what == "GPTQ against round-to-nearest, 3 bits")
TWO_BITS = next(claim for claim in PUBLISHED if claim.what == "GPTQ against round-to-nearest, 2 bits")


def build(tmp_path, make, bits, gptq, rtn, **more):
    folder = tmp_path / "reference-2" / "cpu"
    make.strategy(folder, "baseline", "baseline", [], 2.0, 9)
    for name, (nats, right) in {"gptq": gptq, "rtn": rtn}.items():
        recipe = [{"pass": name, "bits": bits, "group_size": 128}]
        make.strategy(folder, f"{name}-x", "weight_quantization", recipe, nats, right, **more)
    return collect(tmp_path, tmp_path / "none")


def test_published_ratios():
    assert GPTQ.ratios["LLaMA-7B"] == pytest.approx((8.07 - 5.68) / (25.54 - 5.68))
    assert TWO_BITS.ratios["Llama-2-7B"] == pytest.approx(22.61 / 28.04)


@pytest.mark.parametrize(
    "gptq, rtn, order", [(2.2, 2.4, "agrees"), (2.4, 2.2, "does not agree"), (2.3, 2.3, "not resolved")]
)
def test_order_and_ratio(tmp_path, make, gptq, rtn, order):
    book = build(tmp_path, make, 3, (gptq, 8), (rtn, 8))
    pair, ratio, found = compared(book, GPTQ)
    assert found == order and [entry.name for entry in pair] == ["gptq-x", "rtn-x"]
    expected = (np.exp(gptq) - np.exp(2)) / (np.exp(rtn) - np.exp(2))
    assert [ratio[end] for end in ("value", "low", "high")] == pytest.approx([expected] * 3)
    assert order in literature_table(book)._repr_html_()


def test_a_variant_does_not_stand_for_its_method(tmp_path, make):
    recipe = [{"pass": "gptq", "bits": 3, "group_size": 128, "clip": "activations"}]
    make.strategy(tmp_path / "reference-2" / "cpu", "better-gptq", "weight_quantization", recipe, 2.05, 9, megabytes=5.0)
    pair, _, order = compared(build(tmp_path, make, 3, (2.2, 8), (2.4, 8)), GPTQ)
    assert [entry.name for entry in pair] == ["gptq-x", "rtn-x"] and order == "agrees"


def test_accuracy_counts_the_other_way_and_contradictions_are_told(tmp_path, make):
    book = build(tmp_path, make, 2, (2.2, 8), (2.4, 6))
    _, ratio, order = compared(book, TWO_BITS)
    assert ratio["value"] == pytest.approx((90 - 80) / (90 - 60))
    assert order == "published figures contradict each other"


def test_a_ratio_needs_a_loss(tmp_path, make):
    assert compared(build(tmp_path, make, 3, (2.2, 8), (2.0, 9)), GPTQ)[1:] == (None, "does not agree")


def test_what_is_missing_is_not_measured(tmp_path, make):
    book = build(tmp_path, make, 4, (2.1, 9), (2.2, 9), items=False)
    orders = [compared(book, claim)[2] for claim in PUBLISHED]
    assert set(orders) == {"not measured"}
    assert "github.com/locuslab/wanda" in literature_table(book)._repr_html_()
    assert words.literature_words(book) == "None of these comparisons has been measured yet."
