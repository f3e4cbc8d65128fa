"""Token ids that are kept: the same as those of the tokenizer, for as long as texts and tokenizer are the same."""

import numpy as np
import pytest

from qlib.data.tokenizer import encode, encode_once, train_tokenizer

TEXTS = ["def add(first, second):\n", "", "    return first + second\n" * 5]


@pytest.fixture
def ids_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("QLIB_CACHE", str(tmp_path))
    return tmp_path / "ids"


def test_the_same_ids_read_from_a_file_the_second_time(tokenizer, ids_folder):
    expected = encode(tokenizer, TEXTS)
    for _ in range(2):
        found = encode_once(tokenizer, TEXTS)
        assert [ids.tolist() for ids in found] == expected
        assert len(list(ids_folder.iterdir())) == 1
    assert encode_once(tokenizer, []) == []


def test_a_file_for_each_content(tokenizer, ids_folder):
    other = train_tokenizer(["another text with other words, and more of them\n" * 9], 290)
    for count, (made_by, texts) in enumerate([(tokenizer, TEXTS), (tokenizer, TEXTS[::-1]), (other, TEXTS)], start=1):
        assert [ids.tolist() for ids in encode_once(made_by, texts)] == encode(made_by, texts)
        assert len(list(ids_folder.iterdir())) == count


def test_a_broken_file_is_written_anew(tokenizer, ids_folder):
    encode_once(tokenizer, TEXTS)
    (file,) = ids_folder.iterdir()
    whole = file.read_bytes()
    for broken in (b"", whole[: len(whole) // 2], b"nothing"):
        file.write_bytes(broken)
        assert np.concatenate(encode_once(tokenizer, TEXTS)).tolist() == sum(encode(tokenizer, TEXTS), [])
        assert file.read_bytes() == whole
