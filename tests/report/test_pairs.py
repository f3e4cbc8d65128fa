"""What is compared across strategies is resampled together, and agrees with the records' own paired figures."""

from pathlib import Path

import numpy as np
import pytest

from qlib.evaluate.statistics import resample
from qlib.report.book import collect
from qlib.report.pairs import interval_of, sign, together

PUBLISHED = Path(__file__).resolve().parents[2] / "reports" / "published"


@pytest.mark.parametrize("name", ["rtn-int4", "rtn-int8"])
def test_the_paired_figures_of_published_records_come_out_again(tmp_path, name):
    book = collect(tmp_path, PUBLISHED)
    entry = book.get(name)
    baseline, own = together([book.baseline(entry), entry])
    for measured, samples in (
        ("quality.perplexity_ratio", np.exp(own.nats - baseline.nats)),
        ("quality.accuracy_delta", own.accuracy - baseline.accuracy),
        ("quality.perplexity", own.perplexity),
        ("quality.accuracy", own.accuracy),
    ):
        found = interval_of(samples, "", own.documents)
        for end in ("value", "low", "high"):
            assert found[end] == pytest.approx(entry.measure(measured)[end], rel=1e-6, abs=1e-9), (measured, end)


def test_samples_against_a_loop_over_documents(tmp_path, make):
    folder = tmp_path / "m" / "cpu"
    make.strategy(folder, "baseline", "baseline", [], 2.0, 9, model="m", spread=0.3, seed=3)
    book = collect(tmp_path, tmp_path / "none")
    (sample,) = together([book.get("baseline")])
    items, draws = make.scores(2.0, 9, spread=0.3, seed=3), resample(30, 200, 7)
    for times, nats in zip(draws, sample.nats[1:], strict=True):
        chosen = [document for document, count in enumerate(times) for _ in range(count)]
        expected = sum(items["document_nll"][d] for d in chosen) / sum(items["document_tokens"][d] for d in chosen)
        assert nats == pytest.approx(expected)
    assert sample.accuracy == pytest.approx(np.full(201, 90.0))


def test_what_was_not_measured_on_the_same_documents_is_not_compared(trained, tmp_path, make):
    baseline = trained.get("baseline")
    assert together([baseline, None]) is None and together([]) is None
    file = tmp_path / "reference-2" / "cpu" / "narrow" / "items.npz"
    np.savez(file, **make.scores(3.0, 5, documents=29))
    assert together([baseline, trained.get("narrow")]) is None
    file.unlink()
    assert together([baseline, trained.get("narrow")]) is None


def test_signs():
    signs = [sign({"low": low, "high": high}) for low, high in ((0.1, 0.2), (-2, -1), (-1, 1), (None, None))]
    assert signs == [1, -1, 0, 0] and sign(None) == 0
    assert interval_of(np.array([np.nan, 1.0]), "", 1) is None
