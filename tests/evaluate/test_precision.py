"""fp32 for a while: products against float64, and nothing is left behind."""

import pytest
import torch
import torch.nn.functional as F

from qlib.compress import compress
from qlib.evaluate import precision
from qlib.evaluate.precision import in_float32, product
from qlib.layers import packed_layers
from qlib.models.load import load

IDS = torch.tensor([[0, 5, 6, 7, 8, 9]])


@pytest.mark.parametrize("shape", [(3, 7, 96), (1, 96), (0, 96), (2, 3, 4, 96)])
@pytest.mark.parametrize("biased", [False, True])
def test_products_are_those_of_float64(shape, biased):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(shape, generator=generator), torch.randn(40, 96, generator=generator)
    bias = torch.randn(40, generator=generator) if biased else None
    exact = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(product(x, weight, bias).double(), exact, rtol=1e-5, atol=2e-5)
    part = x.transpose(0, -2)  # not contiguous
    torch.testing.assert_close(product(part, weight, bias), product(part.contiguous(), weight, bias))


def test_products_in_other_types_and_for_gradients():
    x, weight = torch.randn(3, 32), torch.randn(8, 32, requires_grad=True)
    product(x, weight).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(8, 32))
    assert product(x.bfloat16(), weight.detach().bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("bits", [4, 8, None])
@pytest.mark.parametrize("tied", [False, True])
def test_the_model_in_fp32_and_as_before_afterwards(model_folder, bits, tied):
    folder = str(model_folder(tied=tied))
    recipe = [{"pass": "rtn", "bits": bits, "group_size": None if bits == 8 else 32}] if bits else []
    model = compress(load(folder), recipe).model if recipe else load(folder).model
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        rounded = model(IDS).logits
        with in_float32(model):
            found = model(IDS).logits
        again = model(IDS).logits
        for layer_name, layer in packed_layers(model).items():
            linear = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            linear.weight.data = layer.compressed().dequantize()
            if layer.bias is not None:
                linear.bias.data = layer.bias.data
            model.set_submodule(layer_name, linear)
        exact = model.double()(IDS).logits
    assert torch.equal(rounded, again)
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-5)
    assert all("forward" not in vars(module) for module in model.modules())
    for name, parameter in before.items():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter.double(), model.get_parameter(name).double())


def test_weights_are_held_up_to_a_limit_and_change_nothing(model_folder, monkeypatch):
    model = compress(load(str(model_folder())), [{"pass": "rtn", "bits": 3, "group_size": 32}]).model
    layers = packed_layers(model)
    calls = dict.fromkeys(layers, 0)

    def run(limit):
        calls.update(dict.fromkeys(layers, 0))
        monkeypatch.setattr(precision, "HELD_BYTES", limit)
        with torch.no_grad(), in_float32(model):
            return model(IDS).logits, model(IDS).logits

    for name, layer in layers.items():
        def counted(name=name, dequantize=layer.compressed):
            calls[name] += 1
            return dequantize()

        layer.compressed = counted
    everything = run(2**30)
    assert set(calls.values()) == {1}
    first = next(iter(layers.values()))
    some = run(4 * first.in_features * first.out_features)
    assert sorted(calls.values()) == [1, *[2] * (len(layers) - 1)]
    nothing = run(0)
    assert set(calls.values()) == {2}
    assert all(torch.equal(logits, everything[0]) for logits in (*everything, *some, *nothing))


def test_an_error_inside_leaves_the_model_as_it_was(tiny_model):
    model = tiny_model()
    with pytest.raises(RuntimeError), in_float32(model):
        raise RuntimeError
    assert model.dtype == torch.bfloat16 and all("forward" not in vars(module) for module in model.modules())


def test_inputs_that_are_rounded_when_the_layer_runs_are_rounded_for_the_scorer_too(model_folder):
    recipe = [{"pass": "rtn", "bits": 8, "group_size": None, "symmetric": True, "activations": "int8"}]
    model = compress(load(str(model_folder())), recipe).model
    layer, x = next(iter(packed_layers(model).values())), torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    scales = x.abs().amax(-1, keepdim=True) / 127
    expected = F.linear((x / scales).round() * scales, layer.compressed().dequantize(), layer.bias.float())
    with in_float32(model), torch.no_grad():
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(layer(x), F.linear(x, layer.compressed().dequantize(), layer.bias.float()), atol=1e-4)
