"""Contexts that run once for all their options, against one row for each option, in every supported architecture."""

import numpy as np
import pytest
import torch

from qlib.compress import compress
from qlib.evaluate.items import Item
from qlib.evaluate.logits import ModelLogits, branch_mask, branch_positions
from qlib.evaluate.precision import in_float32
from qlib.evaluate.quality import score_items
from qlib.models.load import load

KINDS = ("qwen2", "qwen3", "llama", "mistral")


def draw_items(count=12, context=30, length=7, seed=0):
    generator = np.random.default_rng(seed)

    def ids(n):
        return tuple(generator.integers(1, 300, n).tolist())

    return [Item(0, 0, ids(context + i % 2), tuple(ids(length) for _ in range(4))) for i in range(count)]


def compare(model, items):
    """The largest difference between shared contexts and separate rows; both must choose the same options."""
    logits_of = ModelLogits(model)
    with in_float32(model):
        shared, _ = score_items(logits_of, items, start=0)
        separate, _ = score_items(lambda ids, keep: logits_of(ids, keep), items, start=0)
    assert (shared.argmax(1) == separate.argmax(1)).all()
    return np.abs(shared - separate).max()


def shares(model, items):
    contexts = torch.tensor([(0, *items[0].context)])
    with torch.inference_mode(), in_float32(model):
        return ModelLogits(model).branches(contexts, torch.tensor([items[0].options])) is not None


@pytest.mark.parametrize("heads", [1, 2, 4], ids="{}kv".format)
@pytest.mark.parametrize("kind", KINDS)
def test_shared_contexts_give_what_separate_rows_give(tiny_model, kind, heads):
    model, items = tiny_model(kind, num_key_value_heads=heads), draw_items()
    assert shares(model, items)
    assert compare(model, items) < 1e-4


def test_with_attention_written_out(tiny_model):
    model = tiny_model()
    model.set_attn_implementation("eager")
    assert shares(model, draw_items()) and compare(model, draw_items()) < 1e-4


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_with_packed_layers(model_folder, bits):
    subject = compress(load(str(model_folder())), [{"pass": "rtn", "bits": bits, "group_size": 32}])
    assert shares(subject.model, draw_items()) and compare(subject.model, draw_items()) < 1e-4


@pytest.mark.parametrize("length", [1, 2])
def test_short_options_and_no_context(tiny_model, length):
    for context in (0, 5):
        items = [Item(0, 0, item.context[:context], item.options) for item in draw_items(length=length)]
        assert compare(tiny_model(), items) < 1e-4


@pytest.mark.parametrize("kind, extra", [("qwen2", True), ("qwen3", True), ("mistral", False)])
@pytest.mark.parametrize("window, shared", [(37, False), (39, True)])
def test_a_window_shorter_than_the_text_is_not_lifted(tiny_model, kind, extra, window, shared):
    changes = {"use_sliding_window": True, "max_window_layers": 0} if extra else {}
    model = tiny_model(kind, sliding_window=window, **changes)
    items = [item for item in draw_items() if len(item.context) == 31]  # start, 31 and 7 tokens: 39
    assert shares(model, items) == shared
    assert compare(model, items) < 1e-4


def test_unknown_architectures_and_kernels_without_masks_run_row_by_row(tiny_model):
    model = tiny_model()
    model.config._attn_implementation = "flash_attention_2"
    assert not shares(model, draw_items())
    model = tiny_model()
    model.config.model_type = "other"
    assert not shares(model, draw_items())


def test_the_mask_written_out():
    mask, positions = branch_mask(2, 2, 2), branch_positions(2, 2, 2)
    expected = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 1, 1],
    ]
    assert mask.int().tolist() == expected and positions.tolist() == [0, 1, 2, 3, 2, 3]
