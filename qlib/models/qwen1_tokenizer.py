"""The tokenizer of an original Qwen, `qwen.tiktoken`, as a fast tokenizer: without tiktoken and without remote code.

As in tokenization_qwen.py: NFC, cut by a pattern, then merge bytes, first the pair whose union has the lowest rank.
"""

import base64
from pathlib import Path
from typing import Any

from qlib.errors import UserError

__all__ = ["FILE", "SPECIAL", "IM_START", "IM_END", "read_ranks", "find_merges", "load_ranked"]

FILE = "qwen.tiktoken"
CUT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
END, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
#: Their ids follow those of the ranks: 151643 to 151850 in the published models.
SPECIAL = (END, IM_START, IM_END, *(f"<|extra_{number}|>" for number in range(205)))


def read_ranks(file: Path) -> dict[bytes, int]:
    """Rank (which is the id) of every token of a file of lines "token in base64, rank".

    Raises:
        UserError: the file is missing, a line is broken, a rank is missing, or a byte has none.
    """
    if not file.is_file():
        raise UserError(f"{file.parent}: has no {file.name}, the tokenizer of an original Qwen")
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        if line.strip():
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except ValueError:
                shown = line[:40].decode("utf-8", "replace")
                raise UserError(f"{file}: line {number}: {shown!r} is not a token in base64 and its rank") from None
    if missing := set(range(len(ranks))) - set(ranks.values()):
        raise UserError(f"{file}: rank {min(missing)} is missing; allowed: the ranks from 0 on, each once")
    if lost := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise UserError(f"{file}: byte {lost[0]} is no token; allowed: files in which all 256 are")
    return ranks


def find_merges(ranks: dict[bytes, int], file: Path | str = FILE) -> list[tuple[bytes, bytes]]:
    """The pair that every longer token is merged from, in the order of ranks.

    They are the two parts that are left when a token's own bytes are merged by lower ranks only. In a text, merging
    goes the same way inside the stretch that becomes this token, whatever stands around it, so no other pair ever
    meets there: merging by these pairs is merging by ranks.

    Raises:
        UserError: a token is not left in two parts.
    """
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) > 1:
            parts = _merge_below(token, ranks)
            if len(parts) != 2:
                raise UserError(
                    f"{file}: token {token!r} of rank {ranks[token]} is not made of two tokens of lower ranks"
                )
            merges.append((parts[0], parts[1]))
    return merges


def _merge_below(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """Merge the bytes of a token as long as the result has a lower rank than the token itself."""
    limit, parts = ranks[token], [bytes([byte]) for byte in token]
    while len(parts) > 1:
        lowest, at = min((ranks.get(parts[i] + parts[i + 1], limit), i) for i in range(len(parts) - 1))
        if lowest >= limit:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def load_ranked(file: Path) -> Any:
    """A Hugging Face fast tokenizer that gives the tokens of `file`, and one token for each of `SPECIAL` in a text.

    Raises:
        UserError: see `read_ranks` and `find_merges`.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ranks, letters = read_ranks(file), _letters()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = [(spell(left), spell(right)) for left, right in find_merges(ranks, file)]
    core = Tokenizer(models.BPE({spell(token): rank for token, rank in ranks.items()}, merges))
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CUT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    # normalized: looked for after NFC, as the original does
    core.add_special_tokens([AddedToken(text, special=True, normalized=True) for text in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, pad_token=END)


def _letters() -> dict[int, str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's `bytes_to_unicode`)."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in kept]
    return {byte: chr(byte) for byte in kept} | {byte: chr(256 + index) for index, byte in enumerate(others)}
