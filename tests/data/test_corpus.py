"""The corpus: what the manifest says, disjoint splits by content, refusals by name."""

import hashlib
import shutil

import pytest

from qlib.data import corpus
from qlib.data.corpus import MANIFEST, SPLITS, build_manifest, manifest_hash, read_split
from qlib.data.dedupe import COMMON, common_shingles, contained_share, keep_distinct, keep_unseen, shingles
from qlib.errors import UserError

HELD_OUT = ("calibration", "development", "evaluation")


@pytest.fixture(scope="module")
def splits():
    return {split: read_split(split) for split in HELD_OUT}


def test_every_file_is_there_and_unchanged(splits):
    lines = [line.split("\t") for line in MANIFEST.read_text().splitlines() if not line.startswith("#")]
    for split, documents in splits.items():
        digests = [digest for name, _, digest, _ in lines if name == split]
        assert [hashlib.sha256(d.text.encode()).hexdigest() for d in documents] == digests
    assert manifest_hash() == hashlib.sha256(MANIFEST.read_bytes()).hexdigest()


def test_a_tenth_of_the_documents_is_held_out_for_evaluation():
    lines = [line.split("\t") for line in MANIFEST.read_text().splitlines() if not line.startswith("#")]
    drawn = [line[0] for line in lines if line[1] not in corpus.TRAIN_ONLY]
    assert 0.08 < drawn.count("evaluation") / len(drawn) < 0.16  # more is dropped from the training text than from it
    assert set(drawn) == set(SPLITS)
    assert len({line[2] for line in lines}) == len(lines)  # no content twice


def copied(documents, others, common):
    """Share of each document, given by its shingles, that stands in the others, boilerplate left out."""
    seen = set().union(*others)
    return [contained_share(one, seen, common) for one in documents]


@pytest.fixture(scope="module")
def shingled(splits):
    """The shingles of every held-out document, by split."""
    return {split: [shingles(d.text) for d in documents] for split, documents in splits.items()}


def test_no_held_out_document_is_a_copy_of_one_in_another_split(shingled):
    common = common_shingles(sum(shingled.values(), []))
    for split, documents in shingled.items():
        shares = copied(documents, [one for name, some in shingled.items() if name != split for one in some], common)
        # Documents are kept one after the other, so only the later of two alike has been measured.
        assert sum(share > 0.5 for share in shares) <= 0.01 * len(shares)


@pytest.mark.slow
def test_training_text_holds_no_copy_of_held_out_text(shingled):
    train = [shingles(d.text) for d in read_split("train")]
    common = common_shingles([*train, *sum(shingled.values(), [])])
    for documents in shingled.values():
        shares = copied(documents, train, common)
        assert max(shares) < 0.35 and sum(shares) / len(shares) < 0.06


def test_a_changed_file_is_refused_by_name(tmp_path):
    lines = MANIFEST.read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("evaluation"))
    split, package, digest, path = lines[at].split("\t")
    changed = tmp_path / "changed.tsv"
    changed.write_text("\n".join([*lines[:at], f"{split}\t{package}\t{'0' * 64}\t{path}"]))
    with pytest.raises(UserError, match=f"{path} of {package} .* differs from the manifest changed.tsv"):
        read_split("evaluation", changed)
    changed.write_text(f"evaluation\t{package}\t{digest}\tno/such/file.py\n")
    with pytest.raises(UserError, match="no/such/file.py .* is missing"):
        read_split("evaluation", changed)


def test_unknown_split():
    with pytest.raises(UserError, match="split 'test' is unknown; allowed: train"):
        read_split("test")


def test_building_again_gives_the_same_manifest(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "PACKAGES", ("networkx", "joblib"))
    one, two = tmp_path / "one.tsv", tmp_path / "two.tsv"
    counts = build_manifest(one)
    build_manifest(two)
    assert one.read_bytes() == two.read_bytes() and sum(counts.values()) > 100
    shutil.rmtree(tmp_path)


def numbered(first, last):
    return "\n".join(f"line number {i} of a document" for i in range(first, last))


def test_near_copies_are_dropped_and_different_texts_kept():
    original, other = numbered(0, 100), numbered(500, 600)
    edited = original.replace("line number 50 ", "a changed line ")
    vendored = numbered(600, 640) + "\n" + original
    assert keep_distinct([original, other, edited, vendored]) == [0, 1]


def test_a_shared_licence_header_does_not_make_a_copy():
    header = "\n".join(f"# licence line {i}" for i in range(8)) + "\n"
    texts = [header + numbered(1000 * i, 1000 * i + 20) for i in range(COMMON + 5)]
    assert keep_distinct(texts) == list(range(len(texts)))


def test_a_short_text_inside_a_long_one_is_not_held_out():
    short, long = numbered(100, 150), numbered(0, 1000)
    assert keep_distinct([short, long]) == [0, 1]  # the long one is hardly a copy of the short one
    assert keep_unseen([short, numbered(5000, 5100)], [long]) == [1]
