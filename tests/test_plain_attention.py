"""Attention in pieces, and our kernel for its weights: against float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qlib.layers import native, native_attention
from qlib.plain_attention import PIECE, PlainAttention, _Causal, _Windows, causal_attention


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 2 * PIECE + 3), key_heads=st.integers(1, 2), sharing=st.integers(1, 3), seed=st.integers(0, 99),
    width=st.sampled_from([16, 32, 64]),
)  # fmt: skip
@example(tokens=2, key_heads=1, sharing=1, seed=7, width=64)  # gradients that nearly cancel
def test_pieces_give_what_whole_matrices_give(tokens, key_heads, sharing, seed, width):
    """Heads of 16 numbers run torch's products, wider ones our kernels, where there are any."""
    random = torch.Generator().manual_seed(seed)
    heads = (key_heads * sharing, key_heads, key_heads)
    parts = [torch.randn(2, tokens, h, width, generator=random).bfloat16().transpose(1, 2).requires_grad_() for h in heads]
    found = causal_attention(*parts, 0.25)
    gradient = torch.randn(found.shape, generator=random).bfloat16()
    exact = [part.detach().double().requires_grad_() for part in parts]
    wanted = F.scaled_dot_product_attention(*exact, is_causal=True, scale=0.25, enable_gqa=True)
    ours, theirs = torch.autograd.grad(found, parts, gradient), torch.autograd.grad(wanted, exact, gradient.double())
    # products in bf16 round weights and their gradients, which matters where what is summed nearly cancels
    products = native.has_amx() or native.missing() or width < 32
    least = 2**-9 * gradient.double().norm() if products else 1e-3
    for ours, theirs in zip((found, *ours), (wanted, *theirs)):
        assert (ours.double() - theirs).norm() <= 0.012 * theirs.norm() + least
    with torch.no_grad():
        assert torch.equal(causal_attention(*parts, 0.25), found)


@pytest.mark.skipif(bool(native.missing()), reason=native.missing())
def test_our_kernels_are_closer_to_float64_than_products_in_bf16_and_take_any_layout():
    random = torch.Generator().manual_seed(0)
    parts = [torch.randn(2, 150, 3, 32, generator=random).bfloat16().transpose(1, 2).requires_grad_() for _ in range(3)]
    gradient = torch.randn(2, 3, 150, 32, generator=random).bfloat16()
    exact = [part.detach().double().requires_grad_() for part in parts]
    wanted = F.scaled_dot_product_attention(*exact, is_causal=True)
    theirs = (wanted, *torch.autograd.grad(wanted, exact, gradient.double()))

    def results(call, parts):
        out = call(*parts, 32**-0.5)
        return (out, *torch.autograd.grad(out, parts, gradient))

    ours, products = results(_Windows.apply, parts), results(_Causal.apply, parts)
    for one, other, reference in zip(ours, products, theirs):
        assert (one - reference).norm() < 0.9 * (other - reference).norm() and (one - reference).norm() < 4e-3 * reference.norm()
    turned = [part.detach().transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_() for part in parts]
    for one, other in zip(ours, results(causal_attention, turned) if not native.has_amx() else ours):
        assert torch.equal(one, other)
    large = [(30 * part.detach()).requires_grad_() for part in parts]  # scores of hundreds: weights of 0 and 1
    assert all(one.isfinite().all() for one in results(_Windows.apply, large))


def test_fp32_runs_torch_and_is_as_exact():
    q = torch.randn(1, 2, PIECE + 5, 16, generator=torch.Generator().manual_seed(0))
    wanted = F.scaled_dot_product_attention(q.double(), q.double(), q.double(), is_causal=True)
    torch.testing.assert_close(causal_attention(q, q, q, 0.25).double(), wanted, rtol=1e-5, atol=1e-5)


def test_attention_with_a_mask_is_left_to_torch():
    q = torch.randn(1, 1, 4, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.eye(4, dtype=torch.bool)
    with PlainAttention():
        torch.testing.assert_close(F.scaled_dot_product_attention(q, q, q, attn_mask=mask), q)
        seen = F.scaled_dot_product_attention(q, q, q)  # no mask, not causal: all see all
    torch.testing.assert_close(seen, F.scaled_dot_product_attention(q, q, q))


@pytest.mark.skipif(bool(native.missing()), reason=native.missing())
@pytest.mark.parametrize("rows, keys, first, piece", ((6, 3, 0, 3), (8, 37, 33, 4), (8, 35, 33, 4), (128, 300, 172, 128)))
def test_softmax_kernel_against_float64(rows, keys, first, piece):
    scores = (20 * torch.randn(2, rows, keys)).bfloat16()
    scores[0, 0, 0] = -1e4
    seen = torch.arange(keys)[None] <= first + torch.arange(rows)[:, None] % piece
    wanted = scores.double().masked_fill(~seen, -torch.inf).softmax(-1)
    native_attention.causal_softmax(scores, first, piece)
    assert torch.allclose(scores.double(), wanted, rtol=2**-8, atol=1e-30)
    assert (scores[:, ~seen] == 0).all()


@pytest.mark.skipif(bool(native.missing()), reason=native.missing())
@pytest.mark.parametrize("rows, keys, first, piece", ((6, 3, 0, 3), (8, 37, 33, 4), (8, 35, 33, 4), (128, 300, 172, 128)))
def test_softmax_gradient_kernel_against_float64(rows, keys, first, piece):
    scores = (3 * torch.randn(2, rows, keys)).bfloat16()
    native_attention.causal_softmax(scores, first, piece)
    gradients = torch.randn(2, rows, keys).bfloat16()
    p, dp = scores.double(), gradients.double()
    wanted = p * (dp - (p * dp).sum(-1, keepdim=True))
    native_attention.causal_softmax_backward(scores, gradients, first, piece)
    assert torch.allclose(gradients.double(), wanted, rtol=2**-8, atol=1e-6)
    assert (gradients[scores == 0] == 0).all()
