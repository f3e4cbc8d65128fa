"""HQQ against its equations in float64, weight by weight, and against what its steps must keep."""

import math

import numpy as np
import pytest
import torch

from qlib.errors import UserError
from qlib.layers import pack
from qlib.layers.int4 import Int4Linear
from qlib.quantize import hqq, rtn
from qlib.quantize.grid import Grid, fit_grid


def weights(rows=8, columns=256, size=1.0, seed=0):
    draw = np.random.default_rng(seed).standard_t(4, (rows, columns)) * size
    return torch.from_numpy(draw).float()


def paper(group, bits, scale, zero, p, beta, iterations):
    """The best zero of one group: the equations in float64, one weight after the other."""
    best, least = zero, math.inf
    for _ in range(iterations + 1):
        loss, moved = 0.0, []
        for w in group:
            code = min(max(round(w / scale + zero), 0), 2**bits - 1)  # to even, like torch
            error = w - scale * (code - zero)
            loss += abs(error) ** p
            kept = max(abs(error) - abs(error) ** (p - 1) / beta, 0) if error else 0
            moved.append(code - (w - math.copysign(kept, error)) / scale)
        if loss < least:
            best, least = zero, loss
        zero, beta = sum(moved) / len(moved), beta * 1.01
    return best, least


@pytest.mark.parametrize("bits", (2, 3, 4))
@pytest.mark.parametrize("size", (0.05, 5.0))  # the shrinking does nothing, much
@pytest.mark.parametrize("p, beta", ((0.7, 10.0), (1.0, 3.0)))
def test_zeros_are_those_of_the_equations(bits, size, p, beta):
    options = hqq.Options(bits=bits, group_size=64, p=p, beta=beta, iterations=5)
    w = weights(3, 128, size).double().float()
    start = fit_grid(w, Grid(bits, 64, real_zero=True))
    zeros = hqq.optimize_zeros(w, bits, start.scales.float(), start.zeros.float(), options)
    for row in range(3):
        for group in range(2):
            values = w[row, 64 * group : 64 * group + 64].double().tolist()
            told = start.scales[row, group].item(), start.zeros[row, group].item()
            best, least = paper(values, bits, *told, p, beta, 5)
            assert zeros[row, group].item() == pytest.approx(best, abs=1e-3)


def test_shrinking_solves_its_own_problem():
    """With p = 1 it is the soft threshold: the minimum of |e| + beta / 2 (e - r)^2, here by trying."""
    errors = torch.linspace(-2, 2, 41)
    tried = torch.linspace(-3, 3, 60001).double()
    best = tried[(tried.abs() + 1.5 * (tried - errors.double()[:, None]) ** 2).argmin(1)]
    torch.testing.assert_close(hqq.shrink(errors, 3.0, 1.0).double(), best, atol=2e-4, rtol=0)
    assert (hqq.shrink(torch.zeros(3), 10.0, 0.7) == 0).all()


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_zeros_that_move_beat_round_to_nearest(bits):
    w = weights(32, 256, 0.05) + 0.01

    def error(compressed):
        return (compressed.dequantize() - w).double().abs().pow(0.7).view(32, -1, 128).sum(-1)

    solved = hqq.solve(w, hqq.Options(bits=bits))
    assert solved.zeros.dtype == torch.bfloat16 and solved.grid.name == f"int{bits}-g128-z16"
    assert error(solved).sum() < error(rtn.solve(w, rtn.Options(bits=bits))).sum()
    clipped = hqq.solve(w, hqq.Options(bits=bits, clip="mse")).dequantize()
    assert (clipped - w).norm() < (solved.dequantize() - w).norm()


def test_rounded_zeros_are_codes_that_the_packed_kernel_runs():
    w = weights(16, 256, 0.05)
    solved = hqq.solve(w, hqq.Options(round_zeros=True))
    assert solved.zeros.dtype == torch.uint8 and solved.grid == Grid(4, 128)
    assert isinstance(pack(torch.nn.Linear(256, 16), solved), Int4Linear)


def test_pruned_weights_stay_zero():
    w, mask = weights(8, 256), weights(8, 256, seed=1) > 0
    mask[0] = mask[1, :128] = True
    solved = hqq.solve(w, hqq.Options(bits=3), mask)
    assert (solved.dequantize()[~mask] == 0).all()
    free = hqq.solve(w, hqq.Options(bits=3))
    assert torch.equal(solved.zeros[0], free.zeros[0]) and solved.zeros[1, 0] == free.zeros[1, 0]
    assert (hqq.solve(torch.zeros(2, 128), hqq.Options()).dequantize() == 0).all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"element": "nvfp4"}, "^element: nvfp4 is not allowed"),
        ({"symmetric": True}, "^symmetric: true is not allowed"),
        ({"clip": "activations"}, "^clip: activations is not allowed"),
        ({"p": 2.0}, "^p: 2 is not allowed; allowed: 0 to 1"),
    ],
)
def test_what_has_no_zero_to_move_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        hqq.Options(**options)
