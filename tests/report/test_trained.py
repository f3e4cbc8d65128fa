"""What training gives back, in which precision, and what each pass is good for: against figures worked out by hand."""

import numpy as np
import pytest

from qlib.report import figures, frames, words
from qlib.report.book import collect
from qlib.report.numbers import SPACE
from qlib.report.show import figure_html
from qlib.report.trained import NOTHING_LOST, ablation_table, ablations, precision_table, recoveries, recovery_table


def shares(book, name):
    return next(r.shares for r in recoveries(book) if r.entry.name == name)


def test_recovered_shares_by_hand(trained):
    found = shares(trained, "narrow-tuned")
    expected = {
        ("nats", "baseline"): (3.0 - 2.4) / (3.0 - 2.0),
        ("nats", "control"): (3.0 - 2.4) / (3.0 - 1.8),
        ("accuracy", "baseline"): (80 - 50) / (90 - 50),
        ("accuracy", "control"): (80 - 50) / (100 - 50),
    }
    for key, share in expected.items():  # all documents are alike, so that the intervals have no width
        assert [found[key][end] for end in ("value", "low", "high")] == pytest.approx([share] * 3), key


def test_a_control_is_not_recovery_and_what_is_missing_reads_so(trained):
    assert [r.entry.name for r in recoveries(trained)] == [
        "narrow-tuned", "rounded-tuned", "all", "all-but-first-training", "all-but-last-training",
    ]  # fmt: skip
    assert set(shares(trained, "rounded-tuned").values()) == {None}  # nobody ran it untrained
    page = recovery_table(trained)._repr_html_()
    assert "from narrow" in page and "not measured" in page and ">60.0<" in page and ">50.0<" in page
    assert "(before − after) / (before − target)" in page


def test_the_share_has_the_interval_of_a_ratio_drawn_together(trained, tmp_path, make):
    folder = tmp_path / "reference-2" / "cpu"
    for at, (name, nats) in enumerate((("baseline", 2.0), ("narrow", 3.0), ("narrow-tuned", 2.4))):
        np.savez(folder / name / "items.npz", **make.scores(nats, 5, spread=0.2, seed=at))
    draws = np.random.default_rng(7).multinomial(30, np.full(30, 1 / 30), size=200)
    scores = [make.scores(nats, 5, spread=0.2, seed=at) for at, nats in enumerate((2.0, 3.0, 2.4))]
    base, before, after = (draws @ one["document_nll"] for one in scores)
    low, high = np.quantile((before - after) / (before - base), [0.025, 0.975])
    found = shares(trained, "narrow-tuned")["nats", "baseline"]
    assert (found["low"], found["high"]) == pytest.approx((low, high)) and low < found["value"] < high


def test_nothing_to_recover_is_said_so(trained, tmp_path, make):
    np.savez(tmp_path / "reference-2" / "cpu" / "narrow" / "items.npz", **make.scores(1.9, 9))
    found = shares(trained, "narrow-tuned")
    assert found["nats", "baseline"] == found["accuracy", "baseline"] == NOTHING_LOST
    assert NOTHING_LOST in recovery_table(trained)._repr_html_()


def test_ablation_by_hand(trained):
    (parts,) = ablations(trained)
    assert [(p.entry.name, p.missing) for p in parts[:3]] == [
        ("all", ""),
        ("all-but-first-training", "finetune (1 of 2)"),
        ("all-but-last-training", "finetune (2 of 2)"),
    ]
    assert parts[1].ratio["value"] == pytest.approx(np.exp(0.3)) and parts[1].points["value"] == pytest.approx(-10)
    assert parts[2].ratio["value"] == pytest.approx(np.exp(0.1)) and parts[2].points["value"] == pytest.approx(0)
    page = ablation_table(trained)._repr_html_()
    assert page.count("reference<") == 2 and "finetune (1 of 2)" in page and ">1.35" in page


def precision_record(make):
    def perplexity(value):
        return {"quality.perplexity": make.number(value, "perplexity", 0.3)}

    run = {"train.tokens_per_second": make.number(9000, "tokens/s", 100), "train.seconds": make.number(60, "seconds")}
    ratio = {"quality.perplexity_ratio": make.number(1.002, "ratio", 0.003)}
    formats = {"fp32": run | perplexity(20.0), "bf16": run | perplexity(20.04) | ratio, "fp16": run}
    curves = {name: {"0": [[0, 9.0], [1000, 3.0]], "1": [[0, 9.2], [1000, 3.2]]} for name in formats}
    return make.record("precision", "training", {}, formats=formats, details={"curves": curves}, shape_format=None)


def test_training_precisions_stand_apart_from_strategies(tmp_path, make):
    make.write(tmp_path / "reference-2" / "cpu" / "precision", precision_record(make))
    book = collect(tmp_path, tmp_path / "none")
    assert not book.strategies and book.training.name == "precision"
    page = precision_table(book.training)._repr_html_()
    assert page.count("reference<") == 2 and "1.002" in page and "9,000" in page and "not measured" in page
    said = words.precision_words(book).replace(SPACE, " ")
    assert "bf16 trains at 9,000 tokens/s and ends at 1.002× (0.999 to 1.005) the perplexity of fp32" in said
    curves = frames.precision_frame(book.training)
    assert len(curves) == 12 and list(dict.fromkeys(curves["series"])) == ["fp32", "bf16", "fp16"]
    assert "fp16 goes from 9.1 to 3.1 after 1,000 tokens" in frames.curve_alt(curves)


def test_words_and_figures_of_what_was_trained(trained, tmp_path):
    said = words.recovery_words(trained).replace(SPACE, " ")
    assert "narrow-tuned recovers 60.0 % (60.0 to 60.0) of the lost log-perplexity, 50.0 % (50.0 to 50.0)" in said
    assert words.ablation_words(trained).startswith("Without finetune (1 of 2), perplexity is")
    assert words.family_words(trained, "finetuning").startswith("0 of 2 keep at least 99 %")  # without the control
    assert "all is the smallest, 4.3× smaller" in words.family_words(trained, "combined")
    empty = collect(tmp_path / "nothing", tmp_path / "nothing")
    assert words.family_words(empty, "combined") == "None has been measured yet."
    for tell in (words.recovery_words, words.ablation_words, words.precision_words, words.literature_words):
        assert tell(empty).endswith("yet.")
    for draw, data in (
        (figures.perplexity_ratios, frames.ablation_frame(trained)),
        (figures.loss_curve, frames.training_frame(trained)),
        (figures.loss_curve, frames.precision_frame(None)),
        (figures.pareto, frames.pareto_frame(trained, families=["finetuning"])),
    ):
        assert "<svg" in figure_html(draw(data), "x", "c", "a")
    assert list(frames.pareto_frame(trained, families=["finetuning"])["strategy"]) == ["narrow-tuned", "rounded-tuned"]


def test_loss_curves_are_those_of_the_development_set(tmp_path, make):
    one = {"tokens": 10, "seconds": 1, "curve": [[0, 5.0]], "development": [[0, 4.0], [10, 3.0]]}
    two = {"tokens": 10, "seconds": 1, "curve": [[0, 6.0]], "development": []}
    folder = tmp_path / "reference-2" / "cpu"
    make.strategy(folder, "twice", "finetuning", [], 2.0, 9, details={"training": [one, two]})
    frame = frames.training_frame(collect(tmp_path, tmp_path / "none"))
    first, second = "twice (1 of 2)", "twice (2 of 2)"
    assert frame.values.tolist() == [[0, 4.0, first], [10, 3.0, first], [0, 6.0, second]]


def test_curves_are_shown_by_what_was_trained(trained, tmp_path, make):
    recipes = {
        "control": [{"pass": "finetune"}],
        "pruned": [{"pass": "width"}, {"pass": "finetune"}],
        "rounded": [{"pass": "gptq", "bits": 3}, {"pass": "finetune"}],
        "rounded-too": [{"pass": "rtn", "bits": 3}, {"pass": "finetune"}],
    }
    for at, (name, recipe) in enumerate(recipes.items()):
        details = {"training": [{"development": [[0, 3.0 - at], [1000, 2.0 - at]]}]}
        make.strategy(tmp_path / "more" / "reference-2" / "cpu", name, "finetuning", recipe, 2.0, 8, details=details)
    groups = frames.training_groups(collect(tmp_path / "more", tmp_path / "none"), "finetuning")
    assert {name: sorted(set(frame["series"])) for name, frame in groups.items()} == {
        "controls": ["control"], "pruned models": ["pruned"], "models of 3 bits": ["rounded", "rounded-too"],
    }  # fmt: skip
    assert groups["models of 3 bits"].query("series == 'rounded-too'")["loss"].tolist() == [0.0, -1.0]
