"""The answer to the article's claim: what counts as smaller or faster, what stays within its loss, and what is said of it."""

import pytest

from qlib.report.article import CLAIMS
from qlib.report.book import Book, Entry
from qlib.report.fill import book_words
from qlib.report.headline import LIMIT, claims, headline_caption, headline_frame, headline_words, largest
from qlib.report.headline_figure import answer
from qlib.report.kept_speed import by_kept, kept_speed_alt, kept_speed_frame
from qlib.report.numbers import SPACE

WIDTH, TUNE, ROUND = {"pass": "width"}, {"pass": "finetune"}, {"pass": "gptq"}


@pytest.fixture
def book(make):
    """Builds a book from rows of name, family, format, change of accuracy and recipe; half the interval is 0.3 points."""

    def entry(name, family, format, delta=0.0, recipe=(ROUND,)):
        change = {} if family == "baseline" else {"quality.accuracy_delta": make.number(delta, "points", 0.3)}
        record = {"measurements": {"quality.accuracy": make.number(90, "percent", 0.9), **change}, "shape_format": format}
        params = {"recipe": [] if family == "baseline" else list(recipe)}
        return Entry(name, family, "done", "reference-2", "cpu", None, record, params=params)

    def build(*rows):
        speed = Entry("speed-qwen-72b", "speed", "done", "qwen-72b", "cpu", None, make.speed("qwen-72b", "cpu"))
        return Book((entry("baseline", "baseline", "bf16"), *(entry(*row) for row in rows), speed))

    return build


def said(book):
    return headline_words(headline_frame(book)).replace(SPACE, " ")


def test_ratios_are_those_of_the_true_shape(book):
    frame = headline_frame(book(("eight", "weight_quantization", "int8", -0.1), ("masked", "pruning", "bf16", 0, [WIDTH])))
    eight, masked = (frame.set_index("strategy").loc[name] for name in ("eight", "masked"))
    assert eight["size_ratio"] == pytest.approx(144.6 / 73) and masked["size_ratio"] == 1
    assert eight["speed_ratio"] == pytest.approx(236_000 / (45_000 + 32 * 1600))
    assert [eight[f"delta{end}"] for end in ("", "_low", "_high")] == pytest.approx([-0.1, -0.4, 0.2])
    assert (eight["pruning"], masked["pruning"]) == ("", "alone")


def test_baselines_controls_ablations_and_what_has_no_shape_are_left_out(book):
    found = headline_frame(
        book(
            ("control", "finetuning", "bf16", 0, [TUNE]),
            ("guest", "tool", None),
            ("whole", "combined", "int8", 0, [WIDTH, ROUND]),
            ("part", "combined", "int8", 0, [ROUND]),
            ("alike", "weight_quantization", "int8", 0, [ROUND]),  # the same recipe, but no ablation
        )
    )
    assert list(found["strategy"]) == ["whole", "alike"]


def test_the_limit_is_what_the_article_claims_for_pruning():
    pruned = next(claim for claim in CLAIMS if claim.family == "pruning")
    assert LIMIT == pruned.accuracy - CLAIMS[0].accuracy < 0
    row = claims().set_index("family").loc["pruning"]
    assert (row["size_ratio"], row["speed_ratio"], row["delta"]) == (1.5, pytest.approx(4 / 3), LIMIT)
    assert "1.50× smaller, 1.33× as fast, 0.7 points" in headline_words(claims().iloc[:0])


def test_the_whole_interval_must_stay_within_the_loss(book):
    four, eight = ("four", "weight_quantization", "int4-g128", -0.5), ("eight", "weight_quantization", "int8", -0.1)
    words = said(book(four, eight))  # the interval of four begins at -0.8
    assert "the most is 1.98× smaller on disk and 2.45×" in words and "both by eight (−0.1 points, −0.4 to +0.2)" in words
    assert "both by four" in said(book(("four", "weight_quantization", "int4-g128", -0.39), eight))
    worse = ("worse", "weight_quantization", "int4-g128", -0.3)
    frame = headline_frame(book(worse, ("four", "weight_quantization", "int4-g128", 0.1)))
    assert largest(frame, "size_ratio")["strategy"] == "four"  # equally large, but better


@pytest.mark.parametrize(
    "family, recipe, what",
    [
        ("pruning", [WIDTH], "pruning"),
        ("finetuning", [WIDTH, TUNE], "pruning"),
        ("finetuning", [ROUND, TUNE], ""),
        ("combined", [WIDTH, ROUND], ""),
    ],
)
@pytest.mark.parametrize("delta, within", [(-0.2, True), (-2.0, False)])
def test_pruning_is_spoken_of_alone_and_with_recovery_but_not_with_quantization(book, family, recipe, what, delta, within):
    words = said(book(("narrow", family, "int8", delta, recipe), ("masked", "pruning", "bf16", 0.3, [{"pass": "wanda"}])))
    if not what:  # zeros in a dense matrix lose nothing, and gain nothing
        assert words.endswith("No pruning strategy becomes smaller or faster.")
    elif within:
        assert "Pruning, alone or with recovery after it, reaches 1.98× smaller on disk" in words
    else:
        assert "No pruning strategy that becomes smaller or faster stays within it" in words
        assert "closest comes narrow, 1.98× smaller on disk and 2.45×" in words and "(−2.0 points, −2.3 to −1.7)" in words


def test_what_is_smaller_on_disk_alone_is_not_smaller(book, make):
    found = book(("zeros-left-out", "pruning", "int8", 0.0, [WIDTH]))
    formats = found.entries[-1].record["formats"]
    formats["int8"]["size.resident_bytes"] = formats["bf16"]["size.resident_bytes"]
    del formats["int8"]["latency.request_speedup"]
    frame = headline_frame(found)
    assert frame["size_ratio"].iloc[0] > 1.9 and largest(frame, "size_ratio") is None
    words = headline_words(frame).replace(SPACE, " ")
    assert "No pruning strategy becomes smaller or faster." in words
    assert words.endswith("The file alone, without the zeros, is 1.98× smaller by zeros-left-out (0.0 points, −0.3 to +0.3).")
    assert "which memory holds" in headline_caption(frame)


def test_the_figure_shows_claims_hollow_and_counts_what_lies_below(book):
    found = headline_frame(
        book(
            ("best", "weight_quantization", "int8", 0.0),
            ("narrow", "pruning", "int4-g128", -3.0, [WIDTH]),
            ("ruined", "pruning", "int4-g128", -20.0, [WIDTH]),
        )
    )
    figure = answer(found)
    assert len(figure.axes) == 2
    for axes in figure.axes:
        texts = [text.get_text() for text in axes.texts]
        assert texts.count("claimed") == 3 and {"best", "narrow"} < set(texts) and "ruined" not in texts
        assert sum(line.get_fillstyle() == "none" for line in axes.lines) == 3
        assert LIMIT in [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--"]
    assert "1 that loses more than 6 points" in headline_caption(found)
    assert "below the figure" not in headline_caption(found[found["strategy"] == "best"])


def test_nothing_measured_is_no_failure(book):
    empty = headline_frame(Book(()))
    assert empty.empty and answer(empty).axes and "no strategy has been measured" in headline_words(empty)
    untimed = headline_frame(book(("masked", "pruning", "bf16", -1.0, [WIDTH])))
    assert len(answer(untimed).axes) == 2 and "none of it has an interval" in headline_words(untimed)


def test_the_placeholder_says_it(book):
    found = book(("eight", "weight_quantization", "int8", -0.1))
    assert book_words(found)("headline") == headline_words(headline_frame(found))


def test_speed_beside_the_share_that_stays(book):
    found = book(
        ("narrow", "pruning", "int8", -3.0, [WIDTH]),
        ("narrow-tuned", "finetuning", "int8", -1.0, [WIDTH, TUNE]),  # of the same shape
        ("masked", "pruning", "bf16", -1.0, [{"pass": "wanda"}]),
        ("rounded", "weight_quantization", "int4-g128", 0.0),
    )
    frame = kept_speed_frame(found)
    assert list(frame["strategy"]) == ["narrow"] and frame["kept"].iloc[0] == pytest.approx(7300 / 144.6)
    assert "narrow keeps 50.5 % and is 2.45 times as fast, where parameters alone would give 1.98" in kept_speed_alt(frame)
    (axes,) = by_kept(frame).axes
    shares, times = axes.lines[0].get_data()
    assert shares * times / 100 == pytest.approx([1] * len(shares)) and "narrow" in [text.get_text() for text in axes.texts]
    nothing = kept_speed_frame(book())
    assert nothing.empty and by_kept(nothing).axes and "Nothing" in kept_speed_alt(nothing)
