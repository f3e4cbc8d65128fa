"""A GGUF file holds the very values of a subject, read back by the gguf package; what it cannot hold is refused."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, quants
from hypothesis import given, settings
from hypothesis import strategies as st

from qlib.compress import compress
from qlib.errors import UserError
from qlib.export.gguf import export, importance
from qlib.export.gguf_blocks import blocks_of_weight
from qlib.export.gguf_file import TENSORS, block_bits, tensor_types, write_random
from qlib.layers import pack
from qlib.models.load import load
from qlib.models.shapes import Shape
from qlib.quantize.grid import CompressedWeight, Grid, fit_grid, round_to_grid

Type = GGMLQuantizationType


def rounded(grid, shape=(3, 128), seed=0, scale=0.02):
    weight = scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return round_to_grid(weight, grid, *fit_grid(weight, grid))


def values(file):
    """Every tensor as fp32, in the shape torch has it."""
    return {one.name: quants.dequantize(one.data, one.tensor_type) for one in GGUFReader(file).tensors}


def text_of(file, key):
    field = GGUFReader(file).fields.get(key)
    return field and field.contents()


@settings(max_examples=150, deadline=None)
@given(
    bits=st.sampled_from((2, 3, 4, 5, 6, 8)),
    size=st.sampled_from((32, 64, 96, None)),
    symmetric=st.booleans(),
    real_zero=st.booleans(),
    rows=st.integers(1, 5),
    groups=st.integers(1, 4),
    seed=st.integers(0, 1000),
    scale=st.sampled_from((1e-3, 0.02, 5.0)),
)
def test_blocks_hold_the_values_of_every_integer_grid(bits, size, symmetric, real_zero, rows, groups, seed, scale):
    grid = Grid(bits, size, symmetric, real_zero=real_zero and not symmetric)
    weight = rounded(grid, (rows, (size or 32) * groups), seed, scale)
    try:
        type_, data, moved = blocks_of_weight(weight)
    except UserError as error:
        fits = (weight.zeros.float() % 1 == 0).all() and (weight.zeros == 128).all()
        small = (weight.scales.float().half().float() != weight.scales.float()).any()
        assert small or (bits > 4 and not symmetric and not fits), error
        return
    found, ours = quants.dequantize(data, type_), weight.dequantize().numpy()
    if type_ == Type.Q4_1:  # m = -zero x scale has 16 bits or fewer, fp16 keeps 11
        low = (weight.zeros.float() * weight.scales.float()).abs().numpy()
        low = low.repeat(ours.shape[1] // low.shape[1], 1)
        assert (np.abs(found - ours) <= np.maximum(low * 2.0**-11, 2.0**-25) + 1e-6 * np.abs(ours)).all()
        assert moved <= 1 / 64
    else:
        assert moved == 0 and (found == ours).all()
        assert type_ == (Type.Q4_0 if bits <= 4 else Type.Q8_0)


def test_mxfp4_is_gguf_s_own():
    weight = rounded(Grid(4, 32, True, "mxfp4"), (4, 96))
    type_, data, moved = blocks_of_weight(weight)
    assert type_ == Type.MXFP4 and moved == 0
    assert (quants.dequantize(data, type_) == weight.dequantize().numpy()).all()


def with_scale(value):
    weight = rounded(Grid(4, 32, True))
    return CompressedWeight(weight.grid, weight.codes, torch.full_like(weight.scales, value), weight.zeros)


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (rounded(Grid(4, 16, True), (3, 64)), "group_size: 16 is no multiple of 32"),
        (rounded(Grid(4, None, True), (3, 80)), "a width of 80 is no multiple of 32"),
        (rounded(Grid(8, 32, False)), "Q8_0 has no zero"),
        (rounded(Grid(8, None, True, "fp8")), "GGUF has no type for fp8"),
        (with_scale(1e-9), "cannot hold a scale of 9.97e-10"),
        (with_scale(1e6), "cannot hold a scale of 9.99e.05"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(weight, reason):
    with pytest.raises(UserError, match=reason):
        blocks_of_weight(weight)


@pytest.mark.parametrize("kind", ("qwen2", "qwen3", "llama", "mistral"))
@pytest.mark.parametrize("tied", (False, True))
def test_a_file_holds_all_tensors_of_a_model_once(model_folder, tmp_path, kind, tied):
    subject = load(str(model_folder(kind, tied)))
    told = export(subject, tmp_path / "out", dense="bf16")
    found, name = values(told["file"]), told["architecture"]
    assert name == {"mistral": "llama"}.get(kind, kind) and told["file"].endswith("out/model.gguf")
    model = subject.model.model
    assert ("output.weight" in found) == (not tied)
    assert (found["token_embd.weight"] == model.embed_tokens.weight.float().numpy()).all()
    for index, block in enumerate(model.layers):
        for path, tensor in TENSORS.items():
            module = dict(block.named_modules()).get(path)
            if module is None:
                continue
            for part in ("weight", "bias"):
                if (ours := getattr(module, part, None)) is not None:
                    theirs, ours = found.pop(f"blk.{index}.{tensor}.{part}"), ours.float().numpy()
                    if name == "llama" and tensor in ("attn_q", "attn_k"):  # 2 i of a head was i, 2 i + 1 was i + 8
                        ours = ours[[row // 16 * 16 + row % 16 // 2 + 8 * (row % 2) for row in range(len(ours))]]
                    assert (theirs == ours).all()
    assert not [rest for rest in found if rest.startswith("blk.")]
    assert told["bits_per_weight"] == 16 and told["bytes"] > 0


def test_packed_and_dense_linears_stand_side_by_side(model_folder, tmp_path):
    subject = load(str(model_folder("qwen2")))
    block, layers = subject.model.model.layers[0], {}
    for (path, tensor), grid in zip(
        [("self_attn.q_proj", "attn_q"), ("mlp.down_proj", "ffn_down"), ("mlp.up_proj", "ffn_up")],
        [Grid(4, 32, True), Grid(8, None, True), Grid(3, 64, False)],
    ):
        linear = block.get_submodule(path)
        packed = pack(linear, round_to_grid(linear.weight, grid, *fit_grid(linear.weight, grid)))
        setattr(block.get_submodule(path.partition(".")[0]), path.partition(".")[2], packed)
        layers[f"blk.0.{tensor}.weight"] = packed
    told = export(subject, tmp_path / "mixed.gguf")
    found, types = values(told["file"]), told["types"]
    assert [types[name] for name in layers] == ["Q4_0", "Q8_0", "Q4_0"] and types["blk.1.attn_q.weight"] == "F16"
    for name, layer in layers.items():
        assert (found[name] == layer.compressed().dequantize().numpy()).all()
    assert (found["blk.0.attn_q.bias"] == layers["blk.0.attn_q.weight"].bias.float().numpy()).all()
    assert 4.5 < told["bits_per_weight"] < 16 and told["rounding"] == 0


def test_an_embedding_in_8_bits_is_stored_once_for_a_tied_head(model_folder, tmp_path):
    subject = compress(load(str(model_folder(tied=True))), [{"pass": "ends"}])
    told = export(subject, tmp_path / "ends.gguf")
    ours = subject.model.get_input_embeddings().compressed().dequantize().numpy()
    assert told["types"]["token_embd.weight"] == "Q8_0" and "output.weight" not in told["types"]
    assert (values(told["file"])["token_embd.weight"] == ours).all()


def test_a_whole_model_is_refused_or_rounded_anew_on_demand(model_folder, tmp_path):
    subject = compress(load(str(model_folder())), [{"pass": "rtn", "bits": 8, "group_size": 32}])
    with pytest.raises(UserError, match="gguf: blk.0.attn_q .*Q8_0 has no zero"):
        export(subject, tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()
    told = export(subject, tmp_path / "b.gguf", requantize=True)
    found = values(told["file"])
    for index, block in enumerate(subject.model.model.layers):
        ours = block.mlp.down_proj.compressed().dequantize().numpy()
        error = np.abs(found[f"blk.{index}.ffn_down.weight"] - ours)
        assert 0 < error.max() <= np.abs(ours).max() * (0.5 / 127 + 2.0**-11)  # half a step, and the scale in fp16
    assert 0 < told["rounding"] < 1.1  # half a step of a grid up to twice as wide: one end of the range is near 0


def test_pruned_widths_and_tokens_without_a_name(model_folder, tmp_path):
    subject = load(str(model_folder(num_attention_heads=6, vocab_size=320)))
    told = export(subject, tmp_path / "pruned.gguf")
    assert told["architecture"] == "llama" and "written as 'llama'" in told["notes"][0]
    assert text_of(told["file"], "llama.attention.head_count") == 6
    assert text_of(told["file"], "llama.attention.key_length") == 16
    tokens = text_of(told["file"], "tokenizer.ggml.tokens")
    assert len(tokens) == 320 and tokens[-1] == "[PAD319]"


def test_tokenizers_are_written_or_left_out_with_a_note(model_folder, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    subject = load(str(model_folder()))
    told = export(subject, tmp_path / "a.gguf")
    core = subject.tokenizer
    assert text_of(told["file"], "tokenizer.ggml.pre") == "qwen2"  # transformers cuts text Qwen's way for a Qwen model
    assert told["notes"] == ["text is not normalized: llama.cpp knows no NFC"]
    tokens = text_of(told["file"], "tokenizer.ggml.tokens")
    assert tokens[: len(core)] == core.convert_ids_to_tokens(range(len(core)))
    assert text_of(told["file"], "tokenizer.ggml.eos_token_id") == core.eos_token_id
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    subject.tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    told = export(subject, tmp_path / "b.gguf")
    assert text_of(told["file"], "tokenizer.ggml.model") == "none" and "without tokenizer" in told["notes"][0]


def test_what_llama_cpp_cannot_compute_is_refused(model_folder, tmp_path):
    subject = load(str(model_folder()))
    subject.config.rope_parameters = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    with pytest.raises(UserError, match="rope_type 'yarn'"):
        export(subject, tmp_path / "a.gguf")
    subject = load(str(model_folder("qwen3", name="biased", attention_bias=True)))
    with pytest.raises(UserError, match="blk.0.attn_output .*qwen3 has no bias there"):
        export(subject, tmp_path / "a.gguf")
    subject = load(str(model_folder(name="large")))
    subject.model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    with pytest.raises(UserError, match="dense: f16 cannot hold"):
        export(subject, tmp_path / "a.gguf")
    assert export(subject, tmp_path / "a.gguf", dense="bf16")["bits_per_weight"] == 16


def test_importance_is_the_mean_square_of_what_a_linear_reads(model_folder):
    subject = load(str(model_folder()))
    ids = [torch.arange(20)[None], torch.arange(30, 50)[None]]
    found = importance(subject.model, ids)
    block = subject.model.model.layers[0]
    inputs = block.input_layernorm(subject.model.model.embed_tokens(torch.cat(ids).flatten())).double()
    for name in ("attn_q", "attn_v"):
        assert np.allclose(found[f"blk.0.{name}.weight"], inputs.square().mean(0).numpy(), rtol=1e-5)
    assert len(found) == 2 * 7 and found["blk.1.ffn_down.weight"].shape == (128,)
    assert not any(linear._forward_pre_hooks for linear in subject.model.modules())


@pytest.mark.parametrize("kind", ("Q4_0", "Q8_0", "F16", "MXFP4"))
def test_random_files_have_the_true_shape(tmp_path, kind):
    shape = Shape("tiny", 2, 128, 2, 1, 256, 64, tied=kind == "Q8_0", head_dim=64)
    write_random(tmp_path / "random.gguf", shape, kind, "F16")
    found, types = values(tmp_path / "random.gguf"), tensor_types(tmp_path / "random.gguf")
    for name, (rows, columns) in shape.linears.items():
        tensor = f"blk.1.{TENSORS[name]}.weight"
        assert found[tensor].shape == (rows, columns) and types[tensor] == kind
        assert 0.01 < found[tensor].std() < 0.04
    assert found["blk.0.attn_k.bias"].shape == (64,) and ("output.weight" in found) == (not shape.tied)
    assert block_bits(tmp_path / "random.gguf") == {"Q4_0": 4.5, "Q8_0": 8.5, "F16": 16, "MXFP4": 4.25}[kind]
    assert sum(one.size for one in found.values()) == shape.parameters
