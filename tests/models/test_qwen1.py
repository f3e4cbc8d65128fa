"""An original Qwen becomes a Qwen2 that computes what the published equations say; one line for what cannot be."""

import json
import math

import pytest
import torch
from torch.nn.functional import embedding, linear, silu

from qlib.compress import compress
from qlib.errors import UserError
from qlib.models import qwen1, qwen1_config
from qlib.models.load import load
from qlib.models.qwen1_config import context_note, convert_config, convert_generation
from qlib.models.save import save
from qlib.models.shapes import find_shape

IDS = torch.arange(60).view(2, 30) * 7 % 600


def original_logits(config, weights, ids):
    """Logits `[texts, tokens, vocabulary]` of ids `[texts, tokens]`, from the equations of modeling_qwen.py."""
    texts, length = ids.shape
    heads, width, trained = config["num_attention_heads"], config["kv_channels"], config["seq_length"]
    alpha, logs = 1, torch.ones(length)
    if config["use_dynamic_ntk"]:
        alpha = max(2 ** math.ceil(math.log2(length / trained) + 1) - 1, 1)
    if config["use_logn_attn"]:
        logs = torch.tensor([math.log(i, trained) if i > trained else 1.0 for i in range(1, length + 1)])
    base = config["rotary_emb_base"] * alpha ** (width / (width - 2))
    angles = torch.outer(torch.arange(length), base ** (-torch.arange(0, width, 2) / width))  # [tokens, width / 2]

    def norm(x, name):
        return weights[f"{name}.weight"] * x / (x.square().mean(-1, keepdim=True) + config["layer_norm_epsilon"]).sqrt()

    def rotate(x):  # [texts, heads, tokens, width]: channel i turns with channel i + width / 2
        low, high = x.chunk(2, -1)
        return torch.cat((low * angles.cos() - high * angles.sin(), high * angles.cos() + low * angles.sin()), -1)

    x = embedding(ids, weights["transformer.wte.weight"])
    for index in range(config["num_hidden_layers"]):
        block = f"transformer.h.{index}"
        both = linear(
            norm(x, f"{block}.ln_1"), weights[f"{block}.attn.c_attn.weight"], weights[f"{block}.attn.c_attn.bias"]
        )
        q, k, v = (part.view(texts, length, heads, width).transpose(1, 2) for part in both.split(heads * width, -1))
        scores = (rotate(q) * logs[:, None]) @ rotate(k).transpose(-1, -2) / math.sqrt(width)
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(later, -math.inf).softmax(-1) @ v
        x = x + linear(mixed.transpose(1, 2).reshape(texts, length, -1), weights[f"{block}.attn.c_proj.weight"])
        y = norm(x, f"{block}.ln_2")
        a1, a2 = (linear(y, weights[f"{block}.mlp.{name}.weight"]) for name in ("w1", "w2"))
        x = x + linear(a1 * silu(a2), weights[f"{block}.mlp.c_proj.weight"])
    return linear(norm(x, "transformer.ln_f"), weights["lm_head.weight"])


def converted_logits(config, weights, ids):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    model = Qwen2ForCausalLM(Qwen2Config(**convert_config(config))).eval()
    parts = {}
    for name, tensor in weights.items():
        parts |= qwen1.convert_tensor(name, tensor)
    model.load_state_dict(parts)
    with torch.no_grad():
        return model(ids).logits


def distance(config, weights, ids, theirs=None):
    return (converted_logits(config, weights, ids) - original_logits(config, theirs or weights, ids)).abs().max().item()


@pytest.mark.parametrize("base", (500, 10000, 1e6))
@pytest.mark.parametrize("epsilon", (1e-6, 0.1))
def test_the_conversion_computes_what_the_published_code_does(original_config, original_tensors, base, epsilon):
    config = original_config | {"rotary_emb_base": base, "layer_norm_epsilon": epsilon}
    assert distance(config, original_tensors, IDS) < 1e-5


SWAPS = {"w1/w2": ("mlp.up_proj", "mlp.gate_proj"), "q/k": ("self_attn.q_proj", "self_attn.k_proj"),
         "k/v": ("self_attn.k_proj", "self_attn.v_proj"), "norms": ("input_layernorm", "post_attention_layernorm")}  # fmt: skip


@pytest.mark.parametrize("pair", SWAPS.values(), ids=SWAPS)
def test_a_conversion_that_swaps_two_tensors_would_be_noticed(original_config, original_tensors, monkeypatch, pair):
    swap = dict(zip(pair, reversed(pair)))
    swapped = {old: tuple(swap.get(new, new) for new in news) for old, news in qwen1.INSIDE.items()}
    monkeypatch.setattr(qwen1, "INSIDE", swapped)
    assert distance(original_config, original_tensors, IDS) > 0.1


@pytest.mark.parametrize("field, value", (("rotary_emb_base", 10000), ("layer_norm_epsilon", 0.1)))
def test_a_field_that_is_not_carried_over_would_be_noticed(original_config, original_tensors, field, value):
    ours = converted_logits(original_config, original_tensors, IDS)
    theirs = original_logits(original_config | {field: value}, original_tensors, IDS)
    assert (ours - theirs).abs().max() > 0.1


@pytest.mark.parametrize("on", ({"use_logn_attn": False}, {"use_dynamic_ntk": False}, {}))
def test_it_is_exact_up_to_the_length_that_the_note_names_and_not_beyond(original_config, original_tensors, on):
    config = original_config | on
    ids = torch.arange(40)[None] * 7 % 600
    assert distance(config, original_tensors, ids[:, :32]) < 1e-5
    assert distance(config, original_tensors, ids) > 1e-2
    assert convert_config(config)["max_position_embeddings"] == 32
    note = context_note(config)
    assert "exact up to 32 tokens (seq_length)" in note and "\n" not in note
    for name in ("use_logn_attn", "use_dynamic_ntk"):
        assert (name in note) == config[name]


def test_without_scaling_it_is_exact_in_the_whole_context(original_config, original_tensors):
    config = original_config | {"use_logn_attn": False, "use_dynamic_ntk": False}
    assert context_note(config) == "" and convert_config(config)["max_position_embeddings"] == 128
    assert distance(config, original_tensors, torch.arange(128)[None] * 7 % 600) < 1e-5


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
@pytest.mark.parametrize("shard", ("5GB", "20KB"))
def test_load_reads_every_float_format_whole_or_sharded(
    original_folder, original_config, original_tensors, dtype, shard
):
    folder = original_folder(dtype=dtype, shard=shard)
    assert (folder / "model.safetensors.index.json").exists() == (shard != "5GB")
    subject = load(str(folder))
    assert subject.config.model_type == "qwen2" and subject.model.dtype == torch.bfloat16
    assert not any(p.requires_grad or p.is_meta for p in subject.model.parameters()) and not subject.model.training
    assert subject.details == {"context": context_note(original_config)}
    weights = {name: t.to(dtype).bfloat16().float() for name, t in original_tensors.items()}
    with torch.no_grad():
        ours = subject.model.float()(IDS).logits
    assert (ours - original_logits(original_config, weights, IDS)).abs().max() < 1e-5


@pytest.mark.parametrize("recipe", ([], [{"pass": "rtn", "bits": 8, "group_size": 8}]), ids=("whole", "int8"))
def test_what_was_loaded_is_saved_as_a_qwen2(original_folder, tmp_path, recipe):
    subject = compress(load(str(original_folder())), recipe) if recipe else load(str(original_folder()))
    save(subject, tmp_path / "saved", "packed" if recipe else "dense")
    again = load(str(tmp_path / "saved"))
    with torch.no_grad():
        assert torch.equal(again.model(IDS).logits, subject.model(IDS).logits)
    text = "<|im_start|>user\n大语言模型's café<|im_end|>"
    assert again.tokenizer(text)["input_ids"] == subject.tokenizer(text)["input_ids"]
    assert again.config.max_position_embeddings == 32 and again.config.eos_token_id == subject.tokenizer.eos_token_id


def test_constants_that_old_versions_stored_are_passed_over(original_folder, original_tensors):
    for name in ("h.1.attn.masked_bias", "h.0.attn.rotary_emb.inv_freq", "rotary_emb.inv_freq"):
        original_tensors[f"transformer.{name}"] = torch.ones(2)
    assert load(str(original_folder())).model(IDS).logits.isfinite().all()


def test_chat_stops_where_the_original_does(original_folder, ranks):
    folder = original_folder()
    end = len(ranks)
    told = {"chat_format": "chatml", "eos_token_id": end, "pad_token_id": end, "max_window_size": 6144, "top_k": 0,
            "max_new_tokens": 512, "do_sample": True, "top_p": 0.8, "repetition_penalty": 1.1}  # fmt: skip
    (folder / "generation_config.json").write_text(json.dumps(told))
    found = load(str(folder)).model.generation_config
    assert found.eos_token_id == [end, end + 2, end + 1] and found.top_p == 0.8 and not hasattr(found, "chat_format")


def test_a_base_model_stops_at_the_end_of_a_document():
    told = {"chat_format": "raw", "eos_token_id": 9, "stop_words_ids": [[9], [8], [1, 2]]}
    assert convert_generation(told, [7, 6]) == {"eos_token_id": [9, 8]}
    assert convert_generation({"top_p": 0.5}, [7, 6]) == {"top_p": 0.5}


#: Dimensions of the published models, base and Chat, as their report and model cards tell them, and the weights they make:
#: those of the 7B and the 72B are known as totals of their files, too.
PUBLISHED = {
    "1.8B": ({"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 11008,
              "vocab_size": 151936, "seq_length": 8192}, 1_836_828_672),
    "7B": ({"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 22016,
            "vocab_size": 151936, "seq_length": 8192, "max_position_embeddings": 32768}, 7_721_324_544),
    "14B": ({"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "intermediate_size": 27392,
             "vocab_size": 152064, "seq_length": 2048}, 14_167_290_880),
    "72B": ({"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "intermediate_size": 49152,
             "vocab_size": 152064, "seq_length": 32768, "max_position_embeddings": 32768, "rotary_emb_base": 1000000,
             "use_dynamic_ntk": False, "use_logn_attn": False}, 72_287_920_128),
}  # fmt: skip


@pytest.mark.parametrize("raw, weights", PUBLISHED.values(), ids=PUBLISHED)
def test_published_models_have_their_number_of_weights(raw, weights):
    from transformers import Qwen2Config

    from qlib.models.load import empty_model

    config = convert_config(raw)
    shapes = qwen1.expected_tensors(config)
    assert sum(math.prod(shape) for shape in shapes.values()) == weights
    assert config["max_position_embeddings"] == raw["seq_length"]
    small = empty_model(Qwen2Config(**config | {"num_hidden_layers": 1}))
    names = [new for old in shapes if ".h." not in old or ".h.0." in old for new in qwen1.qwen2_names(old)]
    assert sorted(names) == sorted(name for name, _ in small.named_parameters())


def test_the_configuration_of_the_72b_gives_the_known_shape():
    shape, config = find_shape("qwen-72b"), convert_config(PUBLISHED["72B"][0])
    assert (shape.layers, shape.hidden, shape.heads, shape.kv_heads, shape.ffn, shape.vocab, shape.context, shape.eps) == tuple(
        config[name]
        for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size",
                     "vocab_size", "max_position_embeddings", "rms_norm_eps")
    )  # fmt: skip
    assert shape.head_dim == config["hidden_size"] // config["num_attention_heads"]
    assert shape.theta == config["rope_parameters"]["rope_theta"] and shape.tied == config["tie_word_embeddings"]
    assert context_note(PUBLISHED["72B"][0]) == ""
    assert "8192" in context_note(PUBLISHED["7B"][0])


def refused(folder, *words):
    with pytest.raises(UserError) as caught:
        load(str(folder))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


FIELDS = {
    "intermediate_size": (49, "49 is not allowed; allowed: an even number"),
    "kv_channels": (4, "4 is not allowed; allowed: hidden_size / num_attention_heads = 32 / 4"),
    "num_hidden_layers": (0, "0 is not allowed; allowed: a whole number above 0"),
    "vocab_size": (True, "True is not allowed; allowed: a whole number above 0"),
    "hidden_size": ("32", "'32' is not allowed; allowed: a whole number above 0"),
    "rotary_emb_base": (-1, "-1 is not allowed; allowed: a number above 0"),
    "layer_norm_epsilon": (None, "None is not allowed; allowed: a number above 0"),
    "no_bias": (False, "False is not allowed; allowed: True"),
    "rotary_pct": (0.5, "0.5 is not allowed; allowed: 1.0"),
    "tie_word_embeddings": (True, "True is not allowed; allowed: False"),
    "use_dynamic_ntk": ("auto", "'auto' is not allowed; allowed: true, false"),
    "quantization_config": ({"quant_method": "gptq"}, "'gptq' is not supported; allowed: plain weights"),
}


@pytest.mark.parametrize("field, value, message", [(name, *case) for name, case in FIELDS.items()], ids=FIELDS)
def test_fields_that_qwen2_cannot_represent(original_folder, field, value, message):
    refused(original_folder({field: value}), "config.json: ", field, message)


@pytest.mark.parametrize("field", qwen1_config.SIZES)
def test_missing_fields(original_folder, original_config, field):
    folder = original_folder()
    (folder / "config.json").write_text(json.dumps({k: v for k, v in original_config.items() if k != field}))
    refused(folder, "config.json: ", f"{field}: is missing")


LAST = "transformer.h.1.mlp.c_proj.weight"
TENSORS = {
    "missing": (lambda t: t.pop(LAST), f"tensor '{LAST}' is missing"),
    "no head": (lambda t: t.pop("lm_head.weight"), "tensor 'lm_head.weight' is missing"),
    "shape": (
        lambda t: t.update({LAST: t[LAST][:, 1:]}),
        f"'{LAST}' has shape [32, 23], config.json asks for [32, 24]",
    ),
    "images": (
        lambda t: t.update({"transformer.visual.conv1.weight": torch.ones(2)}),
        "'transformer.visual.conv1.weight' belongs",
    ),
    "layers": (
        lambda t: t.update({"transformer.h.2.ln_1.weight": torch.ones(32)}),
        "h.2.ln_1.weight' belongs to no original",
    ),
    "bias": (lambda t: t.update({"transformer.h.0.mlp.w1.bias": torch.ones(24)}), "w1.bias' belongs to no original"),
    "nan": (lambda t: t[LAST].__setitem__((3, 5), math.nan), f"'{LAST}' holds values that are not finite"),
}


@pytest.mark.parametrize("edit, message", TENSORS.values(), ids=TENSORS)
def test_tensors_that_do_not_fit(original_folder, original_tensors, edit, message):
    edit(original_tensors)
    refused(original_folder(), message)


def test_a_vocabulary_that_is_too_small_for_the_tokenizer(original_folder, original_tensors):
    for name in ("transformer.wte.weight", "lm_head.weight"):
        original_tensors[name] = original_tensors[name][:300].clone()
    refused(
        original_folder({"vocab_size": 300}), "vocab_size: 300 is not allowed; allowed: at least 614 (qwen.tiktoken)"
    )


def test_codes_are_no_weights(original_folder):
    refused(
        original_folder(dtype=torch.int8), "model.safetensors: tensor '", "is stored as I8; allowed: BF16, F16, F32"
    )


def test_pickled_weights_only(original_folder):
    folder = original_folder()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin", "run code", "safetensors")


def test_names_and_rows_that_cannot_be_converted():
    with pytest.raises(UserError, match="tensor 'model.norm.weight' belongs to no original Qwen"):
        qwen1.convert_tensor("model.norm.weight", torch.ones(3))
    with pytest.raises(UserError, match=r"c_attn.bias' has shape \[4\]; allowed: rows in 3 equal parts"):
        qwen1.convert_tensor("transformer.h.0.attn.c_attn.bias", torch.ones(4))


def test_thirds_share_no_memory_and_keep_their_type():
    whole = torch.arange(12, dtype=torch.float16).view(6, 2)
    parts = qwen1.convert_tensor("transformer.h.7.attn.c_attn.weight", whole)
    assert list(parts) == [f"model.layers.7.self_attn.{name}_proj.weight" for name in "qkv"]
    assert torch.equal(torch.cat(list(parts.values())), whole)
    assert len({part.untyped_storage().data_ptr() for part in (whole, *parts.values())}) == 4
