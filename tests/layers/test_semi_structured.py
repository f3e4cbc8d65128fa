"""2:4 on sparse tensor cores: refused where it cannot be, and on a GPU equal to the dense product."""

import pytest
import torch

from qlib.errors import UserError
from qlib.layers.semi_structured import SemiStructuredLinear
from qlib.prune.select import choose_mask


def test_another_pattern_and_another_device_are_refused():
    weight = torch.randn(32, 64).bfloat16()
    with pytest.raises(UserError, match="does not keep 2 of every 4"):
        SemiStructuredLinear(weight)
    with pytest.raises(UserError, match="no sparse product on device 'cpu'"):
        SemiStructuredLinear(weight * choose_mask(weight.abs(), 0.5, "2:4"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rows", (1, 5, 64))
def test_it_is_the_dense_product(rows):
    weight = torch.randn(256, 512, device="cuda").bfloat16()
    weight = weight * choose_mask(weight.abs(), 0.5, "2:4")
    x, bias = torch.randn(rows, 512, device="cuda").bfloat16(), torch.randn(256, device="cuda").bfloat16()
    found, wanted = SemiStructuredLinear(weight, bias)(x), torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    assert (found.double() - wanted).norm() < 0.01 * wanted.norm()
