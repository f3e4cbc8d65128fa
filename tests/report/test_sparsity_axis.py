"""All pruning methods on one axis: how much is gone, by which method, what else was done, and what the figure shows."""

import pytest

from qlib.report.book import Book, Entry
from qlib.report.show import svg
from qlib.report.sparsity_axis import FILLS, _marks, by_sparsity, sparsity_alt, sparsity_frame, sparsity_of

TUNE = {"pass": "finetune"}


def entry(name, ratio, recipe, family="pruning", layers=(), kept=None, format="bf16", model="reference-2"):
    """A measured strategy; `layers` are pairs of a linear and the share of its weights that stayed."""
    measured = {"quality.perplexity_ratio": {"value": ratio, "low": ratio - 0.01, "high": ratio + 0.01}}
    details = {"layers": [{"name": f"model.layers.0.{path}", "kept": share} for path, share in layers]}
    record = {"measurements": measured, "kept": kept or {}, "details": details, "shape_format": format}
    steps = [{"pass": step} if isinstance(step, str) else step for step in recipe]
    return Entry(name, family, "done", model, "cpu", None, record, params={"recipe": steps})


def masked(name, ratio, recipe, share=0.5, **more):
    return entry(name, ratio, recipe, layers=[("mlp.up_proj", share)], **more)


@pytest.fixture
def book():
    pattern = {"pass": "sparsegpt", "pattern": "2:4"}
    narrow = {"heads": 1.0, "ffn": 1.0, "layers": 0.5}
    return Book(
        (
            masked("by-size", 1.3, ["magnitude"]),
            masked("by-size-30", 1.1, ["magnitude"], 0.7),
            masked("by-use", 1.25, ["wanda"]),
            masked("planned", 3.1, ["allocate_sparsity", "sparsegpt"], 0.3),
            masked("paired", 1.5, [pattern]),
            masked("paired-tuned", 1.15, [pattern, TUNE], family="finetuning"),
            masked("rounded", 1.27, ["sparsegpt", "gptq"], family="combined", format="int4-g128"),
            masked("part", 1.9, [pattern, "gptq"], family="combined", format="int4-g128"),
            masked("whole", 1.2, [pattern, "gptq", TUNE], family="combined", format="int4-g128"),
            entry("short", 3.0, ["depth"], kept=narrow),
            entry("plain", 1.0, ["gptq"], family="finetuning"),
            entry("control", 1.1, [TUNE], family="finetuning"),
        )
    )


def test_masks_count_by_the_size_of_their_linear():
    layers = [("self_attn.k_proj", 0.5), ("mlp.down_proj", 1.0)]  # 128 x 128 and 128 x 384
    assert sparsity_of(entry("a", 1, ["wanda"], layers=layers)) == pytest.approx(100 * 0.5 / 4)
    assert sparsity_of(entry("a", 1, ["wanda"], layers=layers, model="of-somebody")) == pytest.approx(25)


def test_structures_and_masks_within_them():
    third = {"heads": 4 / 6, "ffn": 2 / 3, "layers": 1.0}
    whole, left = (2 * q + 2 * 128 + 3 * f for q, f in ((384, 384), (256, 256)))  # q and o; k and v, which stay; the FFN
    assert sparsity_of(entry("a", 1, ["width"], kept=third)) == pytest.approx(100 * (1 - left / whole))
    assert sparsity_of(entry("a", 1, ["width"], kept=third, model="of-somebody")) == pytest.approx(100 / 3)
    sixth = {"heads": 1.0, "ffn": 320 / 384, "layers": 1.0}  # no multiple of 128 is left
    assert sparsity_of(entry("a", 1, ["width"], kept=sixth)) == pytest.approx(100 * 3 * 64 / whole)
    assert sparsity_of(entry("a", 1, ["depth"], kept={"heads": 1.0, "ffn": 1.0, "layers": 0.75})) == pytest.approx(25)
    both = masked("a", 1, ["depth", "wanda"], kept={"heads": 1.0, "ffn": 1.0, "layers": 0.5})
    assert sparsity_of(both) == pytest.approx(75)


def test_the_frame_names_method_pattern_and_what_else_was_done(book):
    frame = sparsity_frame(book).set_index("strategy")
    assert list(frame.index) == [
        "by-size", "by-size-30", "by-use", "planned", "paired", "short", "paired-tuned", "rounded", "whole",
    ]  # fmt: skip
    assert dict(frame["method"].loc[["planned", "rounded", "short"]]) == {
        "planned": "sparsegpt", "rounded": "sparsegpt", "short": "depth",
    }  # fmt: skip
    as_it_is, pattern, rounded, trained = FILLS
    assert list(frame["also"]) == [as_it_is] * 4 + [pattern, as_it_is, trained, rounded, trained]
    assert frame["before"].loc["paired-tuned"] == "paired" and frame["before"].loc["whole"] == "part"
    assert frame["pattern"].loc["paired"] == "2:4" and frame["sparsity"].loc["planned"] == pytest.approx(70)
    assert (frame["ratio_low"] < frame["ratio"]).all() and (frame["ratio"] < frame["ratio_high"]).all()


def test_the_front_is_told_and_named(book):
    frame = sparsity_frame(book)
    words = sparsity_alt(frame)
    assert "Of 9 strategies by 4 methods, 3 are beaten by no other" in words
    assert "planned (70 % gone, 3.1 times the perplexity), paired-tuned (50 % gone, 1.15" in words and "by-size-30" in words
    drawn = svg(by_sparsity(frame), "fig-sparsity", "Sparsity")
    assert all(f">{name}<" in drawn for name in ("planned", "paired-tuned", "by-size-30", "2:4", "N:M pattern"))
    assert ">rounded, too<" in drawn and ">by-use<" not in drawn


def test_lines_join_a_method_and_lead_to_what_was_trained(book):
    (axes,) = by_sparsity(sparsity_frame(book)).axes
    joined = [list(line.get_ydata()) for line in axes.lines if line.get_linestyle() == "-" and len(line.get_ydata()) == 2]
    assert [1.1, 1.3] in joined  # from little sparsity to much
    dotted = [list(line.get_ydata()) for line in axes.lines if line.get_linestyle() == ":" and len(line.get_ydata()) == 2]
    assert dotted == [[1.5, 1.15]]  # the part of an ablation is not drawn


def test_marks_differ_and_nothing_measured_is_no_failure(book):
    assert len(set(_marks(sparsity_frame(book)).values())) == 4
    bare = masked("bare", 1.4, ["wanda"])
    bare.record["measurements"]["quality.perplexity_ratio"] = {"value": 1.4}
    failed = Entry("failed", "pruning", "failed", "reference-2", "cpu", None)
    frame = sparsity_frame(Book((bare, failed)))
    assert list(frame["strategy"]) == ["bare"] and "bare" in svg(by_sparsity(frame), "fig-bare", "Bare")
    empty = sparsity_frame(Book(()))
    assert empty.empty and by_sparsity(empty).axes and sparsity_alt(empty) == "Nothing has been measured yet."
