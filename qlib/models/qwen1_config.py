"""The configuration of an original Qwen (`model_type: qwen`) as Qwen2's, and the little that Qwen2 cannot say.

Fields, defaults and meaning are those of configuration_qwen.py and modeling_qwen.py, the code that was published with
Qwen-1.8B, -7B, -14B and -72B and is never run here.
"""

from typing import Any, Callable

from qlib.errors import UserError

__all__ = ["convert_config", "context_note", "convert_generation"]

#: Fields without which nothing can be read; `intermediate_size` is twice the width of the FFN.
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "seq_length")
#: What the published class takes where config.json is silent.
DEFAULTS = {
    "kv_channels": 128, "max_position_embeddings": 8192, "layer_norm_epsilon": 1e-6, "rotary_emb_base": 10000,
    "use_dynamic_ntk": True, "use_logn_attn": True, "no_bias": True, "rotary_pct": 1.0, "tie_word_embeddings": False,
}  # fmt: skip
#: Fields of which Qwen2 knows one value only. (`no_bias` does not speak of q, k and v, which have biases in both.)
ONLY = {"no_bias": True, "rotary_pct": 1.0, "tie_word_embeddings": False}
#: What the original does beyond `seq_length`, while Qwen2 goes on as before.
SCALING = {
    "use_logn_attn": "scales queries by the logarithm of their position",
    "use_dynamic_ntk": "stretches the rotary base",
}
#: Fields of generation_config.json that only the original's own `chat` reads.
OWN = ("chat_format", "max_window_size", "stop_words_ids")


def convert_config(raw: dict[str, Any], where: str = "config.json") -> dict[str, Any]:
    """Fields of a `transformers.Qwen2Config` that computes the same up to `max_position_embeddings` tokens.

    Everything else in `raw` is left out, `auto_map` too.

    Args:
        where: the file, for messages.

    Raises:
        UserError: a field that is missing or has a value that Qwen2 cannot represent.
    """
    raw = DEFAULTS | raw
    if method := (raw.get("quantization_config") or {}).get("quant_method"):
        raise UserError(
            f"{where}: quantization_config.quant_method: '{method}' is not supported; allowed: plain weights"
        )
    vocab, hidden, layers, heads, doubled, _ = (_size(raw, where, name) for name in SIZES)
    for name, only in ONLY.items():
        _field(raw, where, name, lambda value: value == only, repr(only))
    width = _field(raw, where, "kv_channels", lambda value: _whole(value) and value % 2 == 0, "an even number above 0")
    if width * heads != hidden:
        raise UserError(
            f"{where}: kv_channels: {width} is not allowed; "
            f"allowed: hidden_size / num_attention_heads = {hidden} / {heads}"
        )
    _field(raw, where, "intermediate_size", lambda value: value % 2 == 0, "an even number, twice the width of the FFN")
    epsilon, base = (
        _field(raw, where, name, _above_0, "a number above 0") for name in ("layer_norm_epsilon", "rotary_emb_base")
    )
    return {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": doubled // 2,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "hidden_act": "silu",
        "max_position_embeddings": _size(
            raw, where, "seq_length" if _scaling(raw, where) else "max_position_embeddings"
        ),
        "rms_norm_eps": float(epsilon),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(base)},
        "tie_word_embeddings": False,
    } | {name: raw[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if isinstance(raw.get(name), int)}


def context_note(raw: dict[str, Any], where: str = "config.json") -> str:
    """One line: up to what length the conversion is exact; empty if that is the original's whole context."""
    if not (scaling := _scaling(DEFAULTS | raw, where)):
        return ""
    return (
        f"exact up to {raw['seq_length']} tokens (seq_length); beyond them the original "
        f"{' and '.join(f'{SCALING[name]} ({name})' for name in scaling)}, Qwen2 does not"
    )


def convert_generation(raw: dict[str, Any], chat_ends: list[int]) -> dict[str, Any]:
    """Fields of a `transformers.GenerationConfig` that stops where the original's `chat` does.

    Args:
        raw: what generation_config.json says.
        chat_ends: ids of <|im_end|> and <|im_start|>, at which `chat` stops if the format is "chatml".
    """
    told = raw.get("eos_token_id")
    ends = [told] if isinstance(told, int) else list(told or [])
    ends += [words[0] for words in raw.get("stop_words_ids") or [] if isinstance(words, list) and len(words) == 1]
    ends += chat_ends if raw.get("chat_format") == "chatml" else []
    kept = {name: value for name, value in raw.items() if name not in OWN}
    return kept | ({"eos_token_id": list(dict.fromkeys(ends))} if ends else {})


def _scaling(raw: dict[str, Any], where: str) -> list[str]:
    """Those of `SCALING` that are on."""
    return [name for name in SCALING if _field(raw, where, name, lambda value: isinstance(value, bool), "true, false")]


def _size(raw: dict[str, Any], where: str, name: str) -> int:
    return _field(raw, where, name, _whole, "a whole number above 0")


def _field(raw: dict[str, Any], where: str, name: str, fits: Callable[[Any], bool], allowed: str) -> Any:
    if name not in raw:
        raise UserError(f"{where}: {name}: is missing; allowed: {allowed}")
    if not fits(raw[name]):
        raise UserError(f"{where}: {name}: {raw[name]!r} is not allowed; allowed: {allowed}")
    return raw[name]


def _whole(value: Any) -> bool:
    return type(value) is int and value > 0


def _above_0(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < float("inf")
