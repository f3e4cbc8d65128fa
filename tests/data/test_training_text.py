"""The text a model is fine-tuned on: the seed's documents, no more than asked for, none that depends on the build."""

import numpy as np
import pytest

from qlib.data import training_text
from qlib.data.corpus import TRAIN_ONLY, read_entry, split_entries
from qlib.data.source import read_documents
from qlib.data.training_text import check_budget, held_out_windows, read_training
from qlib.errors import UserError


@pytest.fixture
def folder(tmp_path):
    for number in range(60):
        words = "\n".join(f"sentence {number} {i} about add and point and index" for i in range(30))
        (tmp_path / f"{number}.txt").write_text(words)
    return tmp_path


def test_the_seed_decides_what_is_read(folder, tokenizer):
    first, again, other, longer = (
        read_training(tokenizer, str(folder), tokens, seed)
        for tokens, seed in ((3000, [0, 0]), (3000, [0, 0]), (3000, [0, 1]), (4000, [0, 0]))
    )
    assert len(first) == 3000 and np.array_equal(first, again) and not np.array_equal(first, other)
    assert np.array_equal(longer[:3000], first)


def test_no_document_is_read_twice_and_none_that_is_held_out(folder, tokenizer):
    allowed = [document.text for document in read_documents(str(folder), "train")]
    with pytest.raises(UserError, match="tokens: 10000000 are more than .* holds: ([0-9]+) tokens") as refused:
        read_training(tokenizer, str(folder), 10_000_000, 0)
    count = int(str(refused.value).split("holds: ")[1].split()[0])
    texts = tokenizer.decode(read_training(tokenizer, str(folder), count, 0)).split(tokenizer.bos_token)[1:]
    assert sorted(texts) == sorted(allowed)
    for split in ("development", "evaluation"):
        assert not {document.text for document in read_documents(str(folder), split)} & set(texts)


def test_a_budget_far_beyond_the_split_is_refused_with_its_size(folder, tokenizer):
    check_budget(tokenizer, str(folder), 1000)
    with pytest.raises(UserError, match=r"tokens: 10000000 are .* holds: about \d+ tokens, .* [\d,.]+ epochs"):
        check_budget(tokenizer, str(folder), 10_000_000)


def test_the_corpus_is_read_without_the_packages_that_differ_between_builds(tokenizer, monkeypatch):
    kept = split_entries("train", without=TRAIN_ONLY)
    assert TRAIN_ONLY and not {package for _, package, *_ in kept} & set(TRAIN_ONLY)
    assert {package for _, package, *_ in split_entries("train")} > {package for _, package, *_ in kept}
    read = []
    monkeypatch.setattr(training_text, "read_entry", lambda entry: read.append(entry) or read_entry(entry))
    assert len(read_training(tokenizer, "reference", 5000, 0)) == 5000
    assert 0 < len(read) <= training_text.CHUNK and set(read) <= set(kept)


def test_held_out_windows_are_always_the_same_development_text(folder, tokenizer):
    windows = held_out_windows(tokenizer, str(folder), 32, 8)
    assert windows.shape == (8, 32) and np.array_equal(windows, held_out_windows(tokenizer, str(folder), 32, 8))
    allowed = "".join(document.text for document in read_documents(str(folder), "development"))
    for row in windows:
        assert all(part in allowed for part in tokenizer.decode(row).split(tokenizer.bos_token))


def test_a_short_text_gives_short_windows(tmp_path, tokenizer):
    (tmp_path / "book.txt").write_text("".join(f"line {i} of the book\n" for i in range(400)))
    windows = held_out_windows(tokenizer, str(tmp_path / "book.txt"), 100_000, 4)
    assert len(windows) == 1 and 2 <= windows.shape[1] < 100_000
