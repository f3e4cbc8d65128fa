"""`qwen.tiktoken` as a fast tokenizer gives the tokens of merging by ranks: a plain reference, and tiktoken itself."""

import json
import unicodedata

import pytest
import regex
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from original_qwen import PATTERN, TEXT, write_ranks

from qlib.errors import UserError
from qlib.models.load import load
from qlib.models.qwen1_tokenizer import SPECIAL, _letters, find_merges, load_ranked, read_ranks
from qlib.paths import MODELS, REFERENCE
from qlib.runs.subject_hash import model_hash

TEXTS = (
    TEXT,
    "大语言模型 large language model 🚀🎉👩‍👩‍👧‍👦 naïve cafe\u0301 Å \u212b ﬁ ½ ١٢٣ 2024年12月",
    "I'LL we'Re it'S they'd 'ſ a'b\u3000全角　空格\u00a0nbsp\u200bzero\u2028line\x85next\x0b\x0c",
    "def f(x):\n\tif x:\r\n        return x  # 注释\n\n\n   \n",
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n",
    "a<|endoftext|><|extra_0|> <|extra_204|>b <|extra_205|> <|im_end |> < |im_end|> <|im_end|>\u0338",
    "aaaaaaa aaaaa a aa aaa ------- --- ====== -=-=",
    "", " ", "\n", "  x", "x  ", "\ud7ff\uf8ff\U0010ffff",
)  # fmt: skip


@pytest.fixture(scope="module")
def ranked(ranks, tmp_path_factory):
    file = tmp_path_factory.mktemp("ranks") / "qwen.tiktoken"
    write_ranks(file, ranks)
    return load_ranked(file)


def merge(piece, ranks):
    """Byte-pair merging by rank, as tiktoken does it: lowest rank first, leftmost of equals."""
    if piece in ranks:
        return [ranks[piece]]
    parts = [bytes([byte]) for byte in piece]
    while True:
        unions = [(ranks[a + b], at) for at, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in ranks]
        if not unions:
            return [ranks[part] for part in parts]
        at = min(unions)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def encode(text, ranks):
    """tokenization_qwen.py with all special tokens allowed."""
    special = {token: len(ranks) + index for index, token in enumerate(SPECIAL)}
    ids = []
    for part in regex.split("(" + "|".join(map(regex.escape, special)) + ")", unicodedata.normalize("NFC", text)):
        if part in special:
            ids.append(special[part])
        else:
            ids += [i for piece in regex.findall(PATTERN, part) for i in merge(piece.encode(), ranks)]
    return ids


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_tokens_are_those_of_merging_by_rank(ranks, ranked, text):
    ids = ranked(text)["input_ids"]
    assert ids == encode(text, ranks)
    assert ranked.decode(ids) == unicodedata.normalize("NFC", text)


@given(st.text(st.sampled_from(sorted(set(TEXT))), max_size=60))
@settings(max_examples=200, deadline=None)
def test_tokens_of_any_text(ranks, ranked, text):
    assert ranked(text)["input_ids"] == encode(text, ranks)


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_tokens_are_those_of_tiktoken(ranks, ranked, text):
    special = {token: len(ranks) + index for index, token in enumerate(SPECIAL)}
    theirs = tiktoken.Encoding("Qwen", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)
    assert ranked(text)["input_ids"] == theirs.encode(unicodedata.normalize("NFC", text), allowed_special="all")


def test_special_tokens_follow_the_ranks(ranks, ranked):
    assert len(SPECIAL) == 208 and SPECIAL[-1] == "<|extra_204|>"
    assert len(ranked) == len(ranks) + 208
    assert ranked.convert_tokens_to_ids(list(SPECIAL)) == list(range(len(ranks), len(ranks) + 208))
    assert ranked.eos_token == ranked.pad_token == "<|endoftext|>" and ranked.bos_token is None
    text = "<|im_start|>user\n你好<|im_end|>"
    assert ranked.decode(ranked(text)["input_ids"], skip_special_tokens=True) == "user\n你好"


def test_it_is_saved_as_an_ordinary_fast_tokenizer(ranked, tmp_path):
    from transformers import AutoTokenizer

    ranked.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert again(text)["input_ids"] == ranked(text)["input_ids"]


def test_load_takes_the_tokenizer_along(original_folder, ranks):
    tokenizer = load(str(original_folder())).tokenizer
    assert tokenizer(TEXT)["input_ids"] == encode(TEXT, ranks)


def test_every_token_is_merged_from_one_pair(ranks):
    merges = find_merges(ranks)
    assert [left + right for left, right in merges] == [token for token in ranks if len(token) > 1]


def test_merges_of_a_trained_tokenizer_are_found_again():
    core = json.loads((MODELS / REFERENCE / "tokenizer.json").read_text())["model"]
    letters = {letter: byte for byte, letter in _letters().items()}
    merges = [tuple(bytes(map(letters.__getitem__, part)) for part in pair) for pair in core["merges"]]
    ordinary = [token for token in core["vocab"] if token != "<|endoftext|>"]
    assert find_merges({bytes(map(letters.__getitem__, token)): core["vocab"][token] for token in ordinary}) == merges


def test_a_changed_tokenizer_makes_results_out_of_date(original_folder, tmp_path):
    folder = original_folder()
    before = model_hash(str(folder), tmp_path)
    (folder / "qwen.tiktoken").write_text((folder / "qwen.tiktoken").read_text() + "\n\n")
    assert model_hash(str(folder), tmp_path) != before


def test_a_missing_file(original_folder):
    folder = original_folder()
    (folder / "qwen.tiktoken").unlink()
    with pytest.raises(UserError, match="has no qwen.tiktoken"):
        load(str(folder))


BROKEN = {
    "no base64": (
        lambda lines: lines.insert(1, "a$b= 400"),
        r"line 2: 'a\$b= 400' is not a token in base64 and its rank",
    ),
    "no rank": (lambda lines: lines.insert(0, "YQ=="), "line 1: 'YQ==' is not a token in base64 and its rank"),
    "gap": (lambda lines: lines.pop(300), "rank 300 is missing; allowed: the ranks from 0 on"),
    "no such byte": (lambda lines: lines.__setitem__(0, "YWFhYWFhYWFhYWFhYWFh 0"), "byte 0 is no token"),
    "empty": (lambda lines: lines.clear(), "byte 0 is no token"),
    "no parts": (lambda lines: lines.append("UVFRUQ== 406"), "token b'QQQQ' of rank 406 is not made of two tokens"),
}


@pytest.mark.parametrize("edit, message", BROKEN.values(), ids=BROKEN)
def test_broken_files(ranks, tmp_path, edit, message):
    file = tmp_path / "qwen.tiktoken"
    write_ranks(file, ranks)
    lines = file.read_text().splitlines()
    edit(lines)
    file.write_text("\n".join(lines))
    with pytest.raises(UserError, match=message) as caught:
        find_merges(read_ranks(file), file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
