"""The cache of codes: against float64, against transformers' own cache, and as transformers uses it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.cache_utils import DynamicCache

from qlib.layers.kv_cache import CodesLayer, cache_bytes, decode, encode, make_cache, token_bytes

IDS = torch.randint(1, 300, (2, 12), generator=torch.Generator().manual_seed(0))


@st.composite
def states(draw):
    groups, group = draw(st.integers(1, 3)), draw(st.sampled_from([1, 5, 16, 32]))
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 4)), groups * group)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    offset, size = draw(st.sampled_from([0.0, 1.0, -40.0])), draw(st.sampled_from([0.0, 1e-3, 1.0, 300.0]))
    whole = groups == 1 and draw(st.booleans())
    return torch.randn(shape, generator=generator) * size + offset, None if whole else group


@given(states(), st.sampled_from([8, 4]))
def test_rows_of_bytes_hold_what_float64_reads_from_them(case, bits):
    x, group = case
    width = x.shape[-1]
    groups = width // (group or width)
    rows = encode(x, bits, group)
    assert rows.dtype == torch.uint8 and rows.shape == (*x.shape[:-1], token_bytes(width, bits, group))
    plain = rows.numpy()  # codes (low half first), then scales, then zeros
    packed, stored = plain[..., : -4 * groups], plain[..., -4 * groups :]
    halves = packed if bits == 8 else np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)
    numbers = (stored.copy().view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    codes = halves[..., :width].reshape(*x.shape[:-1], groups, -1).astype(np.float64)
    expected = codes * numbers[..., :groups, None] + numbers[..., groups:, None]
    found = decode(rows, bits, group, width).double().numpy()
    assert np.allclose(found, expected.reshape(x.shape), rtol=1e-6, atol=1e-7 * np.abs(expected).max())
    grouped = x.double().numpy().reshape(expected.shape)
    error = np.abs(expected - grouped)
    assert (error <= numbers[..., :groups, None] / 2 + 1e-6 * np.abs(grouped)).all()  # half a step, nothing is cut off
    span = grouped.max(-1) - grouped.min(-1)
    rounded = 2.0**-7 * np.abs(grouped).max(-1)  # what bf16 may add to either end
    assert (numbers[..., :groups] * (2**bits - 1) <= 1.01 * (span + rounded) + 1e-30).all()


@pytest.mark.parametrize("bits, group", [(8, None), (8, 32), (4, None), (4, 64)])
def test_tokens_that_come_one_by_one_are_stored_as_if_together(bits, group):
    keys, values = torch.randn(2, 2, 3, 9, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    together, piecewise = CodesLayer(bits, group), CodesLayer(bits, group)
    expected = together.update(keys, values)
    for part in (slice(0, 6), slice(6, 7), slice(7, 9)):
        found = piecewise.update(keys[:, :, part], values[:, :, part])
    for ours, theirs, original in zip(found, expected, (keys, values)):
        assert torch.equal(ours, theirs) and ours.dtype == torch.bfloat16 and ours.shape == original.shape
    assert torch.equal(piecewise.keys, together.keys) and piecewise.get_seq_length() == 9
    piecewise.crop(-2)
    piecewise.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(piecewise.values, together.values[:, :, :7].flip(0))
    piecewise.reset()
    assert piecewise.get_seq_length() == 0


def asking(model, bits, group_size=None):
    model.config.kv_cache = {"bits": bits, "group_size": group_size}
    return model


@pytest.mark.parametrize("kind", ["qwen2", "mistral"])
def test_a_model_reads_what_its_cache_would_give_back(tiny_model, kind):
    """The logits are those of a model whose ordinary cache rounds keys and values on their way through."""

    class Rounding(DynamicCache):
        def update(self, keys, values, *rest, **more):
            return super().update(*(decode(encode(x, 4), 4, None, 16) for x in (keys, values)), *rest, **more)

    windows = {"sliding_window": 5} if kind == "mistral" else {}
    model = asking(tiny_model(kind, **windows).float(), 4)
    with torch.no_grad():
        plain, expected = (model(IDS, past_key_values=cache).logits for cache in (DynamicCache(), Rounding()))
        cache = make_cache(model)
        found = [model(IDS[:, :8], past_key_values=cache).logits]
        found += [model(IDS[:, at : at + 1], past_key_values=cache).logits for at in range(8, 12)]
        assert torch.allclose(torch.cat(found, 1), expected, atol=1e-5)
        close = model(IDS, past_key_values=make_cache(asking(model, 8))).logits
    assert 0 < (close - plain).norm() < 0.2 * (expected - plain).norm()  # a step of 8 bits is 17 times smaller


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_runs_and_the_bytes_are_those_of_the_arithmetic(tiny_model, beams):
    model = asking(tiny_model(), 4)
    cache = make_cache(model)
    options = dict(max_new_tokens=5, do_sample=False, num_beams=beams, eos_token_id=None, pad_token_id=0)
    out = model.generate(IDS, attention_mask=torch.ones_like(IDS), past_key_values=cache, **options)
    assert out.shape == (2, 17) and cache.get_seq_length() == 16
    assert cache_bytes(cache) == 2 * beams * 16 * 2 * 2 * 2 * token_bytes(16, 4)  # rows, tokens, layers, both, heads
    assert token_bytes(16, 4) == 8 + 4


def test_without_a_setting_it_is_the_usual_cache(tiny_model):
    assert type(make_cache(tiny_model())) is DynamicCache
