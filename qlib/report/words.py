"""Sentences about the results, chosen by the results: they stay true whichever way the numbers fall."""

from qlib.report import numbers
from qlib.report.article import CLAIMS, Claim, chosen
from qlib.report.book import SPEED_MODEL, Book, Entry

__all__ = ["finding", "verdict", "article_verdict", "failure_words"]


def finding(book: Book) -> str:
    """The report's first sentence: the smallest strategy that keeps 99 % of the accuracy, or that there is none."""
    rows = [e for e in book.of() if e.family != "baseline"]
    rows = [e for e in rows if numbers.number(e.measure("quality.accuracy")) is not None]
    rows.sort(key=lambda e: numbers.number(e.measure("size.disk_bytes")) or float("inf"))
    if not rows:
        return "No compressed strategy has been measured yet."
    gates = {answer: [e for e in rows if book.gate(e) == answer] for answer in ("yes", numbers.OPEN, "no")}
    of = f"Of {_count(len(rows), 'compressed strategy', 'compressed strategies')} of {rows[0].model}, "
    if gates["yes"]:
        best = gates["yes"][0]
        is_best = f"{best.name} is the smallest that keeps at least 99 % of the baseline's accuracy"
        return f"{of}{is_best}: {_facts(book, best)}"
    if gates[numbers.OPEN]:
        best = gates[numbers.OPEN][0]
        none = "none is shown to keep 99 % of the baseline's accuracy"
        return f"{of}{none}; {best.name} is the smallest that may: {_facts(book, best)}"
    if gates["no"] == rows:
        best = max(rows, key=lambda e: numbers.number(e.measure("quality.accuracy_delta")) or -100)
        every = "every one loses more than 1 % of the baseline's accuracy"
        return f"{of}{every}; {best.name} loses least: {_facts(book, best)}"
    return f"{of}none can be compared with the baseline yet."


def _count(n: int, one: str, many: str) -> str:
    return f"{n} {one if n == 1 else many}"


def _facts(book: Book, entry: Entry) -> str:
    baseline = book.baseline(entry)
    size, whole = entry.measure("size.disk_bytes"), baseline and baseline.measure("size.disk_bytes")
    times = numbers.ratio(whole, size)
    accuracy, before = entry.measure("quality.accuracy"), baseline and baseline.measure("quality.accuracy")
    facts = [f"{numbers.write(size)} on disk" + (f" ({times} smaller)" if times else "")]
    facts += [f"accuracy {numbers.write(accuracy)} against {numbers.write(before, 'value')}"]
    speed = book.shape(entry).get("latency.decode_speedup")
    if numbers.number(speed) is not None:
        words = numbers.speedup(speed)
        words = f"decode {words} as fast as bf16" if words != numbers.SAME else f"{words} in decode"
        facts.append(f"at the true shape of {SPEED_MODEL.replace('qwen', 'Qwen').replace('b', 'B')}, {words}")
    return "; ".join(facts) + "."


def verdict(book: Book, entry: Entry | None) -> str:
    """``keeps``, ``loses more than`` or ``is not shown to keep`` 99 % of the baseline's accuracy, as one clause."""
    words = {
        "yes": "keeps at least 99 % of the baseline's accuracy",
        "no": "loses more than 1 % of the baseline's accuracy",
        numbers.OPEN: "may or may not keep 99 % of the baseline's accuracy, as the interval holds both",
    }
    if not entry or book.gate(entry) not in words:
        return "has not been compared with the baseline"
    return f"{words[book.gate(entry)]}; change {numbers.write(entry.measure('quality.accuracy_delta'))}"


def article_verdict(book: Book) -> str:
    """Which of the article's claims hold here: a sentence on size and accuracy, and one on time."""
    kept: dict[str, list[str]] = {}
    faster: dict[str, list[str]] = {}
    for claim in CLAIMS[1:]:
        kept.setdefault(_claim_kept(book, claim), []).append(claim.title.lower())
        faster.setdefault(_claim_faster(book, claim), []).append(claim.title.lower())
    return (
        f"Here, the article's claims about size and accuracy {_judged(kept)}. "
        f"Its claims about request time, held against the true shape of Qwen-72B, {_judged(faster)}."
    )


def _judged(names: dict[str, list[str]]) -> str:
    words = {"yes": "hold", "no": "do not hold", numbers.OPEN: "are not resolved"}
    return "; they ".join(f"{words[key]} for {_list(names[key])}" for key in words if key in names)


def _claim_kept(book: Book, claim: Claim) -> str:
    """Whether the strategy is as small as claimed and loses no more than claimed: yes, no or not resolved."""
    entry = chosen(book, claim)
    baseline = entry and book.baseline(entry)
    if not entry or not baseline:
        return numbers.OPEN
    size, whole = (numbers.number(e.measure("size.disk_bytes")) for e in (entry, baseline))
    loss = numbers.meets(entry.measure("quality.accuracy_delta"), claim.accuracy - CLAIMS[0].accuracy, "higher")
    if not size or not whole or loss in (numbers.ABSENT, numbers.OPEN):
        return numbers.OPEN
    return "yes" if size / whole <= claim.size / CLAIMS[0].size and loss == "yes" else "no"


def _claim_faster(book: Book, claim: Claim) -> str:
    """Whether a request is as many times faster as claimed: yes, no or not resolved."""
    entry = chosen(book, claim)
    speedup = book.shape(entry).get("latency.request_speedup") if entry else None
    if numbers.number(speedup) is None:
        return numbers.OPEN
    return numbers.meets(speedup, CLAIMS[0].time / claim.time, "higher")


def _list(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def failure_words(book: Book) -> str:
    """How many strategies failed, in one sentence."""
    done = sum(not e.failed for e in book.entries)
    if not book.failures:
        return f"Nothing failed: all {_count(done, 'run', 'runs')} finished." if done else "Nothing has been run yet."
    failed = f"{_count(len(book.failures), 'run', 'runs')} of {len(book.entries)} failed"
    return f"{failed}; what is missing for that reason reads “not measured”."
