"""Norms and gated units of our own: the numbers of transformers, the gradients of float64."""

import pytest
import torch
from torch import nn
from transformers.models.qwen2.modeling_qwen2 import Qwen2Config, Qwen2MLP, Qwen2RMSNorm

from qlib.layers import native
from qlib.short_work import ShortWork

pytestmark = pytest.mark.skipif(bool(native.missing()), reason=f"no kernels of our own: {native.missing()}")


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "norm":
        module = Qwen2RMSNorm(96)
        module.weight.data = 1 + torch.randn(96) / 2
    else:
        module = Qwen2MLP(Qwen2Config(hidden_size=96, intermediate_size=160))
    return module.bfloat16().requires_grad_(False)


@pytest.mark.parametrize("name", ["norm", "mlp"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_numbers_and_gradients(name, scale):
    module, x = make(name), (torch.randn(3, 17, 96) * scale).bfloat16()
    given = torch.randn(3, 17, 96).bfloat16()
    found = []
    for one, inputs in ((module, x), (make(name).double(), x.double())):
        inputs = inputs.clone().requires_grad_()
        with ShortWork(one):
            out = one(inputs)
        found.append((out, *torch.autograd.grad(out, inputs, given.to(out.dtype))))
    with torch.no_grad():
        theirs = module(x)
    assert "forward" not in vars(module)
    assert (found[0][0] - theirs).norm() <= 2e-3 * theirs.norm()  # a bit here and there, of other exponentials
    for ours, exact in zip(*found):
        assert ours.dtype == torch.bfloat16
        assert (ours - exact).norm() < 6e-3 * exact.norm()


def test_the_gradient_is_as_good_as_that_of_transformers():
    module, x, given = make("norm"), torch.randn(40, 96).bfloat16(), torch.randn(40, 96).bfloat16()

    def error(context) -> float:
        inputs = x.clone().requires_grad_()
        with context:
            (ours,) = torch.autograd.grad(module(inputs), inputs, given)
        exact = x.double().requires_grad_()
        (wanted,) = torch.autograd.grad(make("norm").double()(exact), exact, given.double())
        return float((ours - wanted).norm() / wanted.norm())

    assert error(ShortWork(module)) <= 1.05 * error(torch.enable_grad())


def test_what_the_kernels_do_not_take_runs_as_it_is():
    module, x = make("norm").float(), torch.randn(5, 96)
    with ShortWork(module):
        assert torch.equal(module(x), type(module).forward(module, x))
    trained = make("norm").requires_grad_(True)
    with ShortWork(trained):
        trained(x.bfloat16()).sum().backward()
    assert trained.weight.grad is not None
    odd = Qwen2RMSNorm(50).bfloat16()
    with ShortWork(odd):
        assert torch.equal(odd(x[:, :50].bfloat16()), type(odd).forward(odd, x[:, :50].bfloat16()))
