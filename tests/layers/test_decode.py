"""The lean decoder says what transformers says, with plain and with packed layers, with and without shared keys."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from qlib.errors import UserError
from qlib.evaluate import parts
from qlib.evaluate.fastest import PlainLinear
from qlib.layers import native, native_attention, pack
from qlib.layers.decode import Decoder, _attend
from qlib.layers.embedding import PackedEmbedding, tied_head
from qlib.models.families import blocks_of, linears_of
from qlib.models.shapes import Shape
from qlib.quantize.grid import Grid, fit_grid, round_to_grid

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(params=["own kernels", "torch only"])
def kernels(request, monkeypatch):
    if request.param == "torch only":
        monkeypatch.setattr(native, "missing", lambda: "switched off")


def make(config_class, model_class, kv_heads: int, dtype: torch.dtype):
    torch.manual_seed(0)
    config = config_class(**SIZES, vocab_size=99, num_key_value_heads=kv_heads, tie_word_embeddings=True)
    model = model_class(config).eval().to(dtype)
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1  # norms and biases that are not one and zero
    return model


def rounded(weight: torch.Tensor, grid: Grid):
    return round_to_grid(weight, grid, *fit_grid(weight, grid))


def logits_of(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=ids[None]).logits[0]


@pytest.mark.parametrize("kinds", ((Qwen2Config, Qwen2ForCausalLM), (LlamaConfig, LlamaForCausalLM)))
@pytest.mark.parametrize("kv_heads", (1, 2, 4))
def test_logits_are_those_of_transformers(kinds, kv_heads):
    model, ids = make(*kinds, kv_heads, torch.float32), torch.randint(99, (12,))
    wanted, decoder = logits_of(model, ids), Decoder(model, 16)
    found = [decoder(ids[:5]), *(decoder(one[None]) for one in ids[5:])]
    torch.testing.assert_close(torch.stack(found), wanted[4:], rtol=1e-4, atol=1e-4)
    decoder.rewind(8)
    torch.testing.assert_close(decoder(ids[8:9]), wanted[8], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kv_heads", (1, 2, 4))
def test_a_token_whose_place_only_the_device_knows(kv_heads):
    """What a CUDA graph replays, run here without one."""
    model, ids = make(Qwen2Config, Qwen2ForCausalLM, kv_heads, torch.float32), torch.randint(99, (12,))
    wanted, decoder = logits_of(model, ids), Decoder(model, 16)
    decoder.caches[0].keys[:, 9:], decoder.caches[0].values[:, 9:] = 1e6, 1e6  # what lies behind must not be seen
    decoder(ids[:5])
    with torch.inference_mode():
        for place in range(5, 12):
            decoder.place.fill_(place)
            decoder.id.copy_(ids[place : place + 1])
            torch.testing.assert_close(decoder._step(), wanted[place], rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("format", ("bf16", "int8", "int8-a8", "int4-g32", "fp8-a8"))
def test_a_graph_on_cuda_says_what_the_blocks_say(format):
    shape = Shape("small", 2, 256, 4, 2, 512, 512, head_dim=64)
    device, random = torch.device("cuda"), torch.Generator().manual_seed(0)
    model = parts.build_model(shape, format, PlainLinear, random, device)
    ids, decoder = torch.randint(512, (12,), device=device), Decoder(model, 16)
    wanted = torch.stack([Decoder(model, 16)(ids[: end + 1]) for end in range(4, 12)]).float()
    for _ in range(2):  # the second time the graph is there from the start
        decoder.rewind()
        found = torch.stack([decoder(ids[:5]), *(decoder(one[None]) for one in ids[5:])]).float()
        assert (found - wanted).norm() < 0.02 * wanted.norm()
        assert torch.equal(found.argmax(1), wanted.argmax(1)) or (found - wanted).abs().max() < 0.1


def test_a_packed_model_in_bf16(kernels):
    model, ids = make(Qwen2Config, Qwen2ForCausalLM, 2, torch.bfloat16), torch.randint(99, (10,))
    for block in blocks_of(model):
        for name, linear in linears_of(model, block).items():
            packed = pack(linear, rounded(linear.weight.detach(), Grid(4, 32)))
            parent, _, leaf = name.rpartition(".")
            setattr(block.get_submodule(parent), leaf, packed)
    embedding = PackedEmbedding(rounded(model.get_input_embeddings().weight.detach(), Grid(8, symmetric=True)))
    model.set_input_embeddings(embedding)
    model.set_output_embeddings(tied_head(embedding))
    decoder = Decoder(model, 10)
    found = torch.stack([decoder(one[None]) for one in ids])
    exact = logits_of(model.float(), ids)
    assert (found.float() - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("format", ("int4-g32", "int3-g64", "int2-g64", "int8", "int8-a8"))
def test_blocks_in_one_call_say_what_operators_say(format):
    if native.missing():
        pytest.skip(native.missing())
    shape, random = Shape("tiny", 2, 64, 4, 2, 192, 99, tied=True, head_dim=32), torch.Generator().manual_seed(0)
    model = parts.build_model(shape, format, PlainLinear, random)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=random))
    one, other = Decoder(model, 20), Decoder(model, 20)
    assert one.own is not None
    other.own, ids = None, torch.randint(99, (20,), generator=random)
    steps = [ids[:3], *ids[3:, None]]
    found, wanted = (torch.stack([decoder(step) for step in steps]) for decoder in (one, other))
    assert (found - wanted).norm() <= 2**-7 * wanted.norm()
    assert torch.equal(one.caches[0].values, other.caches[0].values)


def test_blocks_with_a_plain_linear_are_not_one_call():
    shape, random = Shape("tiny", 2, 64, 4, 2, 128, 99, tied=True, head_dim=16), torch.Generator().manual_seed(0)
    model = parts.build_model(shape, "int8", PlainLinear, random)
    assert (Decoder(model, 8).own is None) == bool(native.missing())
    model.model.layers[1].mlp.up_proj = PlainLinear(torch.randn(128, 64).bfloat16())
    assert Decoder(model, 8).own is None and Decoder(model, 8)(torch.tensor([1])).isfinite().all()


def test_own_attention_and_norm_are_those_of_torch():
    if native.missing():
        pytest.skip(native.missing())
    for heads, kv_heads, dim, used in ((4, 2, 16, 0), (14, 2, 64, 37), (3, 3, 128, 300)):
        q, k, v = (torch.randn(1, count * dim).bfloat16() for count in (heads, kv_heads, kv_heads))
        rotary = (torch.rand(1, 1, dim).bfloat16(), torch.randn(1, 1, dim).bfloat16())
        store = torch.randn(2, kv_heads, used + 5, dim).bfloat16()
        ours, exact = store.clone(), store.double()
        found = native_attention.attend(q, k, v, rotary, *ours, used)
        wanted = _attend(q.double(), k.double(), v.double(), [one.double() for one in rotary], *exact, used)
        assert (ours.double() - exact).abs().max() <= 2**-7 * exact.abs().max()  # the turned key is rounded
        assert (found.double() - wanted).abs().max() <= 2**-6 * wanted.abs().max()
    x, weight = torch.randn(5, 96).bfloat16() * 30, torch.randn(96).bfloat16()
    wanted = torch.nn.functional.rms_norm(x.double(), (96,), weight.double(), 1e-6)
    assert torch.allclose(native_attention.rms_norm(x, weight, 1e-6).double(), wanted, rtol=2**-7)


def test_a_model_of_random_weights_decodes_in_every_format():
    shape, random = Shape("tiny", 2, 64, 4, 2, 128, 99, tied=True, head_dim=16), torch.Generator().manual_seed(0)
    for format in ("bf16", "int8", "int4-g32", "int3-g64", "int2-g64"):
        model = parts.build_model(shape, format, PlainLinear, random)
        logits = Decoder(model, 8)(torch.tensor([1, 2, 3]))
        assert logits.shape == (99,) and logits.isfinite().all()
        assert isinstance(model.get_input_embeddings(), PackedEmbedding) == (format != "bf16")


def test_other_architectures_are_refused():
    with pytest.raises(UserError, match="model_type: 'qwen3' cannot be decoded here; allowed: qwen2, llama, mistral"):
        Decoder(make(Qwen3Config, Qwen3ForCausalLM, 2, torch.float32), 4)
