"""bf16 optimizer: AdamW in what it computes, and what each rounding does to updates that are too small for bf16."""

import pytest
import torch

from qlib.train.bf16_adamw import Bf16AdamW, round_stochastically


def test_the_update_is_that_of_adamw():
    """Against torch's optimizer in float64, where rounding to bf16 is all that differs."""
    start = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)).bfloat16()
    ours, exact = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.double())
    told = {"lr": 0.05, "betas": (0.9, 0.95), "weight_decay": 0.1}
    steps = Bf16AdamW([ours], **told), torch.optim.AdamW([exact], **told)
    for seed in range(3):
        gradient = torch.randn(40, 30, generator=torch.Generator().manual_seed(seed)).bfloat16()
        ours.grad, exact.grad = gradient.clone(), gradient.double()
        for one in steps:
            one.step()
    moved = (exact.detach() - start.double()).abs().mean()
    assert (ours.detach().double() - exact.detach()).abs().mean() < 0.05 * moved


def test_stochastic_rounding_is_right_on_average_and_picks_neighbours():
    generator = torch.Generator().manual_seed(1)
    values = torch.tensor([1.0, 1.001, -1.001, 1.005, 3e-5, -7.3])
    below = values.view(torch.int32).bitwise_and(-(2**16)).view(torch.float32)
    drawn = torch.stack([round_stochastically(values, generator).float() for _ in range(4000)])
    step = (below.view(torch.int32) + 2**16).view(torch.float32) - below
    assert ((drawn == below) | (drawn == below + step)).all()
    spread = step.abs() / 2 / 4000**0.5
    assert ((drawn.mean(0) - values).abs() < 5 * spread + 1e-9).all()
    assert (drawn[:, 0] == 1).all(), "a number that bf16 holds stays"


@pytest.mark.parametrize("rounding, arrives", [("nearest", False), ("kahan", True), ("stochastic", True)])
def test_many_updates_below_a_step_of_the_format(rounding, arrives):
    """1000 steps of 1e-4 from 1, where bf16 numbers lie 2^-7 or 2^-8 apart: nearest never moves."""
    weight = torch.nn.Parameter(torch.ones(2000).bfloat16())
    optimizer = Bf16AdamW([weight], lr=1e-4, betas=(0.0, 0.0), rounding=rounding, seed=3)
    for _ in range(1000):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    if arrives:
        assert abs(weight.detach().float().mean().item() - 0.9) < 0.005
    else:
        assert (weight == 1).all() and optimizer.lost == optimizer.updates == 2000


def test_it_repeats_itself_and_touches_no_global_state():
    state, found = torch.get_rng_state(), []
    for seed in (1, 1, 2):
        weight = torch.nn.Parameter(torch.ones(500).bfloat16())
        optimizer = Bf16AdamW([weight], lr=1e-3, rounding="stochastic", seed=seed)
        for _ in range(5):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        found.append(weight.detach().clone())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert torch.equal(torch.get_rng_state(), state)
