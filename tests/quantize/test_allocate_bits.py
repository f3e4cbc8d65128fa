"""Mixed bits: sensitivities are what they claim, the model comes back bit for bit, the plan keeps the budget."""

from types import SimpleNamespace

import pytest
import torch

from qlib.compress import compress
from qlib.errors import UserError
from qlib.layers import packed_layers
from qlib.models.families import blocks_of, linears_of
from qlib.models.load import load
from qlib.quantize import allocate_bits as module
from qlib.quantize import rtn
from qlib.quantize.allocate_bits import Options, format_at, linears_by_path, plan, rounded, sensitivities
from qlib.recipe import Context

RECIPE = [{"pass": "allocate_bits", "group_size": 32, "samples": 2}, {"pass": "rtn", "group_size": 32}]


@pytest.mark.parametrize(
    "given, words",
    [
        ({"budget": 3.9}, "budget: 3.9 is not allowed; allowed: 4 to 8 bits"),
        ({"budget": 8.5}, "budget: 8.5 is not allowed; allowed: 4 to 8 bits"),
        ({"bits": [4, 7]}, "bits: 7 is not allowed; allowed: widths out of 2, 3, 4, 5, 6, 8"),
        ({"bits": []}, "bits: is empty"),
        ({"bits": [4, 8, 4]}, "bits: 4 is given twice"),
    ],
)
def test_options_that_cannot_be_met_are_refused(given, words):
    with pytest.raises(UserError) as caught:
        Options(**given)
    assert str(caught.value).startswith(words)


def test_a_group_size_that_does_not_divide_is_refused_before_anything(model_folder):
    recipe = [{"pass": "allocate_bits", "group_size": 128}, {"pass": "rtn", "group_size": 32}]
    with pytest.raises(UserError, match=r"recipe\[0\]\.group_size: 128 does not divide the 64 input channels of"):
        compress(load(str(model_folder())), recipe, text_of(model_folder))


def ids(rows=4, length=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 300, (2, length), generator=generator) for _ in range(rows // 2)]


def lively(model, seed=0):
    """Give a random model larger weights, so that rounding them shows."""
    generator = torch.Generator().manual_seed(seed)
    for block in blocks_of(model):
        for linear in linears_of(model, block).values():
            linear.weight.data = (torch.randn(linear.weight.shape, generator=generator) * 0.15).bfloat16()
    return model


@pytest.mark.parametrize("kind, tied", [("qwen2", False), ("llama", True)])
def test_the_sensitivity_is_the_divergence_of_the_whole_model(tiny_model, kind, tied):
    formats = [format_at(4, 32), format_at(8, 32)]
    paths, losses = sensitivities(lively(tiny_model(kind, tied)), ids(), formats)
    exact = lively(tiny_model(kind, tied)).double()  # the same in fp64, through the model's own forward
    batch = torch.cat(ids())
    with torch.no_grad():
        log_p = exact(batch).logits.log_softmax(-1)
        for path in ("model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"):
            linear = exact.get_submodule(path)
            original = linear.weight.data
            for column, options in enumerate(formats):
                linear.weight.data = rtn.solve(original.bfloat16(), rtn.Options(**options)).dequantize().double()
                log_q = exact(batch).logits.log_softmax(-1)
                expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
                assert losses[paths.index(path), column] == pytest.approx(expected, rel=0.02, abs=2e-7)
            linear.weight.data = original
    assert (losses[:, 0] > 10 * losses[:, 1]).all() and len(paths) == 14


def state_of(model):
    return {name: (tensor.data_ptr(), tensor.dtype, tensor.clone()) for name, tensor in model.state_dict().items()}


def same(model, before):
    after = model.state_dict()
    return after.keys() == before.keys() and all(
        after[name].dtype == dtype and torch.equal(after[name], tensor) for name, (_, dtype, tensor) in before.items()
    )


def test_the_model_comes_back_bit_for_bit(tiny_model):
    model = tiny_model(tied=True)
    before, forwards = state_of(model), model(torch.cat(ids())).logits
    sensitivities(model, ids(), [format_at(4, 32)])
    assert same(model, before) and torch.equal(model(torch.cat(ids())).logits, forwards)
    assert not any("forward" in vars(part) for part in model.modules())


def test_the_model_comes_back_when_something_fails(tiny_model, monkeypatch):
    model = tiny_model()
    before, calls = state_of(model), []

    def failing(*args):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return outputs(*args)

    outputs = module._outputs
    monkeypatch.setattr(module, "_outputs", failing)
    with pytest.raises(KeyboardInterrupt):
        sensitivities(model, ids(), [format_at(4, 32)])
    assert same(model, before)
    linear = blocks_of(model)[0].self_attn.q_proj
    pointer = linear.weight.data_ptr()
    with pytest.raises(ValueError), rounded(linear, rtn.Options(2, 32)):
        assert linear.weight.data_ptr() != pointer
        raise ValueError
    assert linear.weight.data_ptr() == pointer and linear.weight.dtype == torch.bfloat16


def test_the_plan_and_its_details(model_folder):
    subject = load(str(model_folder()))
    found = plan(subject, Options(budget=5.0, bits=[8, 4], group_size=32, samples=3), Context(ids()))
    linears = dict(linears_by_path(subject.model))
    assert found.keys() == linears.keys() == subject.details["allocation"].keys()
    for path, options in found.items():
        assert options == format_at(subject.details["allocation"][path], 32)
        assert rtn.Options(**options).grid.bits in (4, 8)
    rows = subject.details["sensitivity"]
    assert len(rows) == 2 * 14 and {row["bits"] for row in rows} == {4, 8} and all(row["kl"] >= 0 for row in rows)
    weights = {path: linear.weight.numel() for path, linear in linears.items()}
    average = sum(weights[path] * options["bits"] for path, options in found.items()) / sum(weights.values())
    assert 4 < average <= 5


def text_of(model_folder):
    """Text of the user's own that is long enough for a few windows."""
    folder = model_folder(name="texts")
    for old in folder.iterdir():
        old.unlink()
    for number in range(40):
        lines = (f"def add_{number}_{line}(first, second):\n    return first + {line}\n" for line in range(6))
        (folder / f"file{number}.py").write_text("\n".join(lines), encoding="utf-8")
    return SimpleNamespace(text=str(folder), samples=4, length=32)


def test_end_to_end_the_later_pass_follows_the_plan(model_folder):
    texts = text_of(model_folder)
    subject = compress(load(str(model_folder())), RECIPE, texts)
    packed = packed_layers(subject.model)
    chosen = {name: layer.grid.bits for name, layer in packed.items()}
    assert chosen == subject.details["allocation"] and set(chosen.values()) == {4, 8}
    for name, layer in packed.items():
        assert layer.grid.name == ("int8" if chosen[name] == 8 else "int4-g32")
        assert layer.grid.symmetric == (chosen[name] == 8)
    sizes = {name: layer.in_features * layer.out_features for name, layer in packed.items()}
    assert sum(sizes[name] * chosen[name] for name in sizes) <= 5 * sum(sizes.values())
    assert subject.details["shape_format"] is None and subject.details["mix"]
    again = compress(load(str(model_folder(name="again"))), RECIPE, texts)
    assert again.details["sensitivity"] == subject.details["sensitivity"]


def test_a_packed_model_is_refused(model_folder):
    packed = compress(load(str(model_folder())), [{"pass": "rtn", "group_size": 32}])
    with pytest.raises(UserError, match="allocate_bits"):
        compress(packed, [RECIPE[0]], text_of(model_folder))
