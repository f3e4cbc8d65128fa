"""Train a byte-level BPE tokenizer and turn documents into token ids."""

import hashlib
import io
import zipfile
from importlib import metadata
from typing import Iterable, Sequence

import numpy as np

from qlib.errors import UserError
from qlib.paths import cache_folder, write_atomic

__all__ = ["END", "train_tokenizer", "start_token", "cut_places", "encode", "encode_once", "encode_stream"]

END = "<|endoftext|>"  # ends a document, and stands before a text as its only context


def train_tokenizer(texts: Iterable[str], vocab_size: int):
    """Train byte-level BPE (Sennrich et al. 2016, on bytes as in GPT-2) and return a Hugging Face fast tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, bos_token=END)


def start_token(tokenizer) -> int:
    """The id that stands before a text: beginning-of-text if the tokenizer has one, else end-of-text.

    Raises:
        UserError: it has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise UserError("tokenizer: has neither a beginning-of-text nor an end-of-text token")


def cut_places(tokenizer) -> dict[str, frozenset[int] | None]:
    """Ids of tokens that begin with a line break ("line") or go on inside a word ("word"); None for "any"."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))], clean_up_tokenization_spaces=False)
    return {
        "line": frozenset(i for i, text in enumerate(texts) if text.startswith("\n")),
        "word": frozenset(i for i, text in enumerate(texts) if text[:1].isalnum()),
        "any": None,
    }


def encode(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of every text, without special tokens."""
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def encode_once(tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """`encode`, kept as a file that goes by the content of tokenizer and texts: `[tokens]` for each text.

    Every strategy reads the same texts, and tokenizing them takes longer than many a recipe.
    """
    core = getattr(tokenizer, "backend_tokenizer", None)
    if not texts or core is None:  # a tokenizer in Python: nothing tells its whole state
        return [np.array(ids, dtype=np.int32) for ids in encode(tokenizer, texts)]
    state = [core.to_str(), metadata.version("tokenizers"), getattr(tokenizer, "split_special_tokens", None)]
    digest = hashlib.sha256(repr(state).encode("utf-8"))
    for text in texts:
        digest.update(hashlib.sha256(text.encode("utf-8")).digest())
    path = cache_folder() / "ids" / f"{digest.hexdigest()[:32]}.npz"
    try:
        with np.load(path, allow_pickle=False) as stored:
            flat, lengths = stored["ids"], stored["lengths"]
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):  # not there, or not whole
        documents = encode(tokenizer, texts)
        lengths = np.array([len(ids) for ids in documents], dtype=np.int64)
        flat = np.fromiter((i for ids in documents for i in ids), np.int32, count=int(lengths.sum()))
        buffer = io.BytesIO()
        np.savez(buffer, ids=flat, lengths=lengths)
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, buffer.getvalue())
    return np.split(flat, np.cumsum(lengths)[:-1])


def encode_stream(tokenizer, texts: Sequence[str], chunk: int = 256) -> np.ndarray:
    """One stream of ids `[tokens]`, every text preceded by the start token; uint16 where the vocabulary fits."""
    start = start_token(tokenizer)
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    parts = []
    for at in range(0, len(texts), chunk):
        for ids in encode(tokenizer, texts[at : at + chunk]):
            parts.append(np.array([start, *ids], dtype=dtype))
    return np.concatenate(parts)
