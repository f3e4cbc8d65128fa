"""Texts of the user, and the windows drawn for calibration."""

import pytest
import torch

from qlib.data.calibration import read_calibration
from qlib.data.source import read_documents
from qlib.errors import UserError
from qlib.params import Calibration


@pytest.fixture
def folder(tmp_path):
    for number in range(40):
        words = "\n".join(f"sentence {number} {i} about add and point and index" for i in range(40))
        (tmp_path / f"{number}.txt").write_text(words)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    return tmp_path


def test_splits_of_a_folder_share_no_document_and_lose_none(folder):
    splits = {s: {d.text for d in read_documents(str(folder), s)} for s in ("calibration", "development", "evaluation")}
    assert sum(map(len, splits.values())) == 40 == len(set.union(*splits.values()))


def test_a_single_file_is_cut_into_documents(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("".join(f"line {i}\n" for i in range(2000)))
    splits = [read_documents(str(file), s) for s in ("calibration", "development", "evaluation")]
    assert sum(len(d.text.splitlines()) for documents in splits for d in documents) == 2000


def test_what_is_no_text_is_refused(tmp_path):
    with pytest.raises(UserError, match="neither 'reference' nor an existing file or folder"):
        read_documents("no/such/text", "evaluation")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 100)
    with pytest.raises(UserError, match=r"latin.txt: is not UTF-8 text \(byte 3\)"):
        read_documents(str(tmp_path / "latin.txt"), "evaluation")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UserError, match="too little text"):
        read_documents(str(tmp_path / "empty.txt"), "evaluation")


def test_the_seed_decides_the_calibration_windows(folder, tokenizer):
    asked = Calibration(str(folder), samples=12, length=16)
    state = torch.get_rng_state()
    first, again, other = (torch.cat(read_calibration(tokenizer, asked, seed, rows=5)) for seed in (0, 0, 1))
    assert first.shape == (12, 16) and torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_more_windows_than_the_text_holds(folder, tokenizer):
    with pytest.raises(UserError, match="calibration.samples: 9999999 windows of 16 tokens are more than the"):
        read_calibration(tokenizer, Calibration(str(folder), samples=9999999, length=16), 0)
