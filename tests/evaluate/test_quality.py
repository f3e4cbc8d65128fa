"""The scorer against sums written out in float64, window by window and option by option."""

import numpy as np
import torch

from qlib.evaluate import quality
from qlib.evaluate.items import LEVELS, Item, build_items, cut_windows
from qlib.evaluate.quality import log_probabilities, score_items, score_windows


def documents(count=6, length=700, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.integers(1, 300, size=length + 50 * i).tolist() for i in range(count)]


CUTS = {"line": frozenset(range(60)), "word": frozenset(range(60, 200)), "any": None}


def logits_function(model):
    model = model.float()
    return lambda ids, keep=0: model(input_ids=ids).logits[:, -keep:]


def log_likelihood(logits_of, ids):
    """log p of each token but the first, one row at a time, in float64."""
    with torch.no_grad():
        logits = logits_of(torch.tensor([ids]))[0].double()
    return [(logits[i] - logits[i].exp().sum().log())[ids[i + 1]].item() for i in range(len(ids) - 1)]


def test_windows_of_different_lengths(tiny_model):
    logits_of = logits_function(tiny_model())
    windows = [[5, 6, 7], list(range(1, 40)), [9], list(range(50, 90)), [3, 4]]
    scores = score_windows(logits_of, windows, start=0)
    assert scores.tokens.tolist() == [3, 39, 1, 40, 2]
    expected = [-sum(log_likelihood(logits_of, [0, *window])) for window in windows]
    np.testing.assert_allclose(scores.nll, expected, rtol=1e-5)


def test_options_behind_their_context_and_alone(tiny_model):
    logits_of = logits_function(tiny_model())
    items = build_items(documents(), CUTS, seed=0)[:7]
    inside, alone = score_items(logits_of, items, start=0)
    for i, item in enumerate(items):
        for j, option in enumerate(item.options):
            with_context = log_likelihood(logits_of, [0, *item.context, *option])[-len(option) :]
            np.testing.assert_allclose(inside[i, j], sum(with_context), rtol=1e-5)
            np.testing.assert_allclose(alone[i, j], sum(log_likelihood(logits_of, [0, *option])), rtol=1e-5)


def test_options_of_different_lengths_and_the_same_option_twice(tiny_model):
    logits_of = logits_function(tiny_model())
    items = [Item(0, 0, (5, 6), ((7, 8), (9,))), Item(0, 0, (), ((7, 8), (3, 4, 5)))]
    inside, alone = score_items(logits_of, items, start=0)
    assert alone[0, 0] == alone[1, 0]
    for i, item in enumerate(items):
        for j, option in enumerate(item.options):
            expected = sum(log_likelihood(logits_of, [0, *item.context, *option])[-len(option) :])
            np.testing.assert_allclose(inside[i, j], expected, rtol=1e-5)


def test_what_else_is_in_a_batch_does_not_matter(tiny_model, monkeypatch):
    logits_of = logits_function(tiny_model())
    items, windows = build_items(documents(), CUTS, seed=0)[:9], [list(range(1, n)) for n in (40, 3, 25, 40)]
    together = *score_items(logits_of, items, start=0), score_windows(logits_of, windows, start=0).nll
    monkeypatch.setattr(quality, "BATCH_TOKENS", 1)
    alone = *score_items(logits_of, items, start=0), score_windows(logits_of, windows, start=0).nll
    for one, other in zip(together, alone):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_log_probabilities_are_normalised_and_predict_each_token(tiny_model):
    logits_of = logits_function(tiny_model())
    rows = next(iter(log_probabilities(logits_of, [[5, 6, 7, 8]], start=0)))
    np.testing.assert_allclose(rows.double().exp().sum(-1), 1, rtol=1e-5)
    picked = [rows[i, token].item() for i, token in enumerate([5, 6, 7, 8])]
    np.testing.assert_allclose(picked, log_likelihood(logits_of, [0, 5, 6, 7, 8]), rtol=1e-4)


def test_items_do_not_overlap_and_hold_one_true_option():
    texts = documents(12)
    items = build_items(texts, CUTS, seed=0)
    spans = {}
    for item in items:
        ids, level = texts[item.document], LEVELS[item.level]
        assert len(item.context) == level.context and {len(o) for o in item.options} == {level.continuation}
        assert len(set(item.options)) == 4
        passage = [*item.context, *item.options[0]]
        start = next(i for i in range(len(ids)) if ids[i : i + len(passage)] == passage)
        spans.setdefault(item.document, []).append((start, start + len(passage)))
        allowed = CUTS[level.cut] or range(300)
        assert all(option[0] in allowed for option in item.options)
        for option in item.options[1:]:  # from the same document, outside the passage
            assert any(tuple(ids[i : i + len(option)]) == option for i in range(len(ids)))
    for found in spans.values():
        found.sort()
        assert all(stop <= start for (_, stop), (start, _) in zip(found, found[1:]))
    assert np.bincount([item.level for item in items]).min() >= len(items) // 3 - 2


def test_items_follow_the_seed_and_a_limit_thins_them_evenly():
    texts = documents(12)
    assert build_items(texts, CUTS, 0) == build_items(texts, CUTS, 0) != build_items(texts, CUTS, 1)
    some = build_items(texts, CUTS, 0, limit=10)
    assert len(some) == 10 and some[0].document == 0 and some[-1].document == 11


def test_arrays_of_ids_are_as_good_as_lists():
    texts = documents(12)
    arrays = [np.array(ids, dtype=np.int32) for ids in texts]
    assert build_items(arrays, CUTS, 0) == build_items(texts, CUTS, 0)
    assert cut_windows(arrays, 64) == cut_windows(texts, 64)
    assert all(type(i) is int for item in build_items(arrays, CUTS, 0) for i in (*item.context, *item.options[0]))


def test_windows_lie_inside_their_documents():
    texts = documents(3) + [[1, 2, 3]]
    windows = cut_windows(texts, 64, per_document=2)
    assert [number for number, _ in windows] == [0, 0, 1, 1, 2, 2, 3]
    for number, window in windows:
        assert len(window) == min(64, len(texts[number]))
        assert any(texts[number][i : i + len(window)] == window for i in range(len(texts[number])))
