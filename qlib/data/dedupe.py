"""Near-duplicate removal by line shingles, so that no held-out passage is a copy of a training one."""

from collections import Counter
from typing import Sequence

__all__ = ["shingles", "common_shingles", "contained_share", "keep_distinct", "keep_unseen"]

WIDTH = 5  # lines in a shingle
LIMIT = 0.3  # a document of which this share stands elsewhere is a copy
COMMON = 20  # a shingle in more documents than this is boilerplate (licence headers), not evidence of a copy


def shingles(text: str) -> set[int]:
    """Hash every run of five consecutive non-empty, stripped lines of `text`."""
    lines = [line for line in (raw.strip() for raw in text.splitlines()) if line]
    return {_hash("\n".join(lines[i : i + WIDTH])) for i in range(max(len(lines) - WIDTH + 1, 1))}


def _hash(text: str) -> int:
    # Not `hash`: it is salted per process, and the manifest must come out the same everywhere.
    from hashlib import blake2b

    return int.from_bytes(blake2b(text.encode("utf-8"), digest_size=8).digest(), "little")


def contained_share(doc: set[int], seen: set[int], common: set[int]) -> float:
    """Share of a document's shingles, boilerplate left out, that occur in `seen`."""
    own = doc - common
    return len(own & seen) / len(own) if own else 1.0


def common_shingles(docs: Sequence[set[int]]) -> set[int]:
    """Boilerplate: shingles that stand in many documents."""
    counts = Counter(s for doc in docs for s in doc)
    return {s for s, n in counts.items() if n > COMMON}


def keep_unseen(texts: Sequence[str], others: Sequence[str], limit: float = LIMIT) -> list[int]:
    """Return the indices of texts of which less than `limit` is contained in `others` taken together.

    The counterpart of `keep_distinct` for what is held out: a short text may lie in a long one, of which it is too
    small a part for the long one to count as a copy.
    """
    docs, rest = [shingles(text) for text in texts], [shingles(text) for text in others]
    common, seen = common_shingles([*docs, *rest]), set().union(*rest)
    return [index for index, doc in enumerate(docs) if contained_share(doc, seen, common) < limit]


def keep_distinct(texts: Sequence[str], limit: float = LIMIT) -> list[int]:
    """Return the indices of documents of which less than `limit` is contained in the documents kept before them.

    A document that consists of boilerplate only is dropped. Containment, not Jaccard similarity, is compared: a
    vendored module inside a long file counts as a copy although the two files differ in length.
    """
    docs = [shingles(text) for text in texts]
    common = common_shingles(docs)
    seen: set[int] = set()
    kept = []
    for index, doc in enumerate(docs):
        if contained_share(doc, seen, common) < limit:
            kept.append(index)
            seen |= doc
    return kept
