"""A solver and training against each alone: paired by recipe, told by intervals."""

import numpy as np
import pytest

from qlib.report.book import collect
from qlib.report.either import either_table, either_words, found_both

TUNE = {"pass": "finetune", "tokens": 1000, "loss": "distillation"}


@pytest.fixture
def folder(tmp_path, make):
    def write(name, recipe, nats, seed, spread=0.05):
        make.strategy(tmp_path / "reference-2" / "cpu", name, "finetuning", recipe, nats, 8, spread=spread, seed=seed)

    solver, plain = ({"pass": name, "bits": 2, "group_size": 128} for name in ("gptq", "rtn"))
    write("solved", [solver], 2.9, 1)
    write("both", [solver, TUNE], 2.3, 2)
    write("plain-tuned", [plain, TUNE], 2.31, 3, spread=0.5)
    write("other-bits", [plain | {"bits": 3}, TUNE], 2.1, 4)
    write("other-tokens", [plain, TUNE | {"tokens": 2000}], 2.0, 5)
    return tmp_path


def test_pairs_share_grid_and_training(folder):
    book = collect(folder, folder / "none")
    [found] = found_both(book)
    assert (found.entry.name, found.untrained.name, found.plain.name) == ("both", "solved", "plain-tuned")
    nats = {name: np.load(folder / f"reference-2/cpu/{name}/items.npz")["document_nll"].sum() / 600 for name in ("both", "solved")}
    assert found.ratios[0]["value"] == pytest.approx(np.exp(nats["both"] - nats["solved"]))


def test_the_words_follow_the_intervals(folder):
    book = collect(folder, folder / "none")
    assert "beats the solver alone in 1 of 1, and" in either_words(book)
    assert "round-to-nearest in 0 of 1 (1 not resolved)" in either_words(book)
    page = either_table(book)._repr_html_()
    assert "both" in page and "Training from rtn" in page


def test_a_loss_is_called_one(folder, make):
    recipe = [{"pass": "rtn", "bits": 2, "group_size": 128}, TUNE]
    make.strategy(folder / "reference-2" / "cpu", "plain-tuned", "finetuning", recipe, 1.9, 8, spread=0.05, seed=6)
    assert "in 0 of 1 (loses in 1)" in either_words(collect(folder, folder / "none"))


def test_without_pairs_that_is_said(trained):
    assert found_both(trained) == [] and "not been measured" in either_words(trained)
