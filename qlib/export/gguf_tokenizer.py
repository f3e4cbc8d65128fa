"""Tokenizers of Hugging Face in GGUF: byte-level BPE as it is, others not at all."""

import json
from typing import Any

from gguf import GGUFWriter, TokenType

__all__ = ["write_tokenizer"]

_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
#: How text is cut before merging, as tokenizer.json says it, and llama.cpp's name for it.
CUTS = {
    "byte-level": "gpt-2",
    _ENGLISH + r"\p{N}" + _REST: "qwen2",
    _ENGLISH + r"\p{N}{1,3}" + _REST: "llama-bpe",
}


def write_tokenizer(writer: GGUFWriter, tokenizer: Any, vocab: int) -> list[str]:
    """Write a byte-level BPE tokenizer as it is; any other is left out, and a note says so."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    core = json.loads(backend.to_str()) if backend else {}
    if (cut := _cut_of(core)) is None or len(tokenizer) > vocab:
        writer.add_tokenizer_model("none")
        return ["without tokenizer: only byte-level BPE that cuts text in a known way is written; give it token ids"]
    names = {number: text for text, number in core["model"]["vocab"].items()}
    types = dict.fromkeys(names, TokenType.NORMAL)
    for added in core["added_tokens"]:
        names[added["id"]] = added["content"]
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut)
    writer.add_token_list([names.get(number, f"[PAD{number}]") for number in range(vocab)])
    writer.add_token_types([types.get(number, TokenType.UNUSED) for number in range(vocab)])
    merges = core["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    bos, eos, first = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer("a")["input_ids"][:1]
    for number, add in ((bos, writer.add_bos_token_id), (eos, writer.add_eos_token_id)):
        if number is not None:
            add(number)
    writer.add_add_bos_token(bos is not None and first == [bos])
    writer.add_add_eos_token(False)
    if isinstance(template := getattr(tokenizer, "chat_template", None), str):
        writer.add_chat_template(template)
    return ["text is not normalized: llama.cpp knows no NFC"] if core.get("normalizer") else []


def _cut_of(core: dict[str, Any]) -> str | None:
    """llama.cpp's name for how a tokenizer cuts text, or None."""
    if core.get("model", {}).get("type") != "BPE" or core["model"].get("byte_fallback"):
        return None
    before = core.get("pre_tokenizer") or {}
    *splits, last = before.get("pretokenizers", [before])
    if last.get("type") != "ByteLevel" or last["add_prefix_space"]:
        return None
    if [one["type"] for one in splits] not in ([], ["Split"]):
        return None
    return CUTS.get(splits[0]["pattern"].get("Regex") if splits else "byte-level" if last["use_regex"] else None)
