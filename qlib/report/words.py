"""Sentences about the results, chosen by the results: they stay true whichever way the numbers fall."""

from qlib.report import numbers
from qlib.report.article import CLAIMS, Claim, candidates, chosen, smaller
from qlib.report.book import SPEED_MODEL, Book, Entry
from qlib.report.literature import PUBLISHED, compared
from qlib.report.relations import control_of, is_control, wholes
from qlib.report.trained import ablations, recoveries

__all__ = [
    "finding", "verdict", "article_verdict", "family_words", "recovery_words", "precision_words", "ablation_words",
    "literature_words", "failure_words",
]  # fmt: skip


def finding(book: Book) -> str:
    """The report's first sentence: the smallest strategy that keeps 99 % of the accuracy, or that there is none."""
    rows = [e for e in book.of() if e.family != "baseline" and not is_control(e)]
    rows = [e for e in rows if numbers.number(e.measure("quality.accuracy")) is not None]
    rows.sort(key=lambda e: numbers.number(e.measure("size.disk_bytes")) or float("inf"))
    if not rows:
        return "No compressed strategy has been measured yet."
    gates = {answer: [e for e in rows if book.gate(e) == answer] for answer in ("yes", numbers.OPEN, "no")}
    fits = {answer: [e for e in gates[answer] if smaller(book, e)] for answer in gates}  # dense zeros do not
    of = f"Of {_count(len(rows), 'compressed strategy', 'compressed strategies')} of {rows[0].model}, "
    if fits["yes"]:
        best = fits["yes"][0]
        is_best = f"{best.name} is the smallest that keeps at least 99 % of the baseline's accuracy"
        return f"{of}{is_best}: {_facts(book, best)}"
    if fits[numbers.OPEN]:
        best = fits[numbers.OPEN][0]
        none = "none that becomes smaller" if gates["yes"] else "none"
        none += " is shown to keep 99 % of the baseline's accuracy"
        return f"{of}{none}; {best.name} is the smallest that may: {_facts(book, best)}"
    if fits["no"]:
        best = max(fits["no"], key=lambda e: numbers.number(e.measure("quality.accuracy_delta")))
        every = "every one" if gates["no"] == rows else "every one that becomes smaller"
        every += " loses more than 1 % of the baseline's accuracy"
        return f"{of}{every}; {best.name} loses least: {_facts(book, best)}"
    return f"{of}none that becomes smaller can be compared with the baseline yet."


def _count(n: int, one: str, many: str) -> str:
    return f"{n} {one if n == 1 else many}"


def _facts(book: Book, entry: Entry) -> str:
    baseline = book.baseline(entry)
    size, whole = entry.measure("size.disk_bytes"), baseline and baseline.measure("size.disk_bytes")
    times = numbers.ratio(whole, size)
    accuracy, before = entry.measure("quality.accuracy"), baseline and baseline.measure("quality.accuracy")
    facts = [f"{numbers.write(size)} on disk" + (f" ({times} smaller)" if times else "")]
    facts += [f"accuracy {numbers.write(accuracy)} against {numbers.write(before, 'value')}"]
    if control := control_of(book, entry):
        after = numbers.write(control.measure("quality.accuracy"), "value")
        facts.append(f"the uncompressed model after the same training reaches {after}")
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
    for claim in (c for c in CLAIMS[1:] if c.size):
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
    if entry is None:
        return "no" if candidates(book, claim) else numbers.OPEN
    if not smaller(book, entry, claim.size / CLAIMS[0].size):
        return "no"
    loss = numbers.meets(entry.measure("quality.accuracy_delta"), claim.accuracy - CLAIMS[0].accuracy, "higher")
    return numbers.OPEN if loss == numbers.ABSENT else loss


def _claim_faster(book: Book, claim: Claim) -> str:
    """Whether a request is as many times faster as claimed: yes, no or not resolved."""
    entry = chosen(book, claim)
    speedup = book.shape(entry).get("latency.request_speedup") if entry else None
    if numbers.number(speedup) is None:
        return numbers.OPEN
    return numbers.meets(speedup, CLAIMS[0].time / claim.time, "higher")


def _list(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def family_words(book: Book, family: str) -> str:
    """How many of a family keep 99 %, which loses least, and which is smallest."""
    rows = [e for e in book.of(family=family) if numbers.number(e.measure("quality.accuracy_delta")) is not None]
    rows = [e for e in rows if not is_control(e)]
    if not rows:
        return "None has been measured yet."
    gates = [book.gate(e) for e in rows]
    keep = "keeps" if gates.count("yes") == 1 else "keep"
    facts = [f"{gates.count('yes')} of {len(rows)} {keep} at least 99 % of the baseline's accuracy"]
    facts += [f"for {gates.count(numbers.OPEN)} the interval leaves it open"] if numbers.OPEN in gates else []
    ratios = [(e.measure("quality.perplexity_ratio"), e.name) for e in rows]
    ratios = [(ratio, name) for ratio, name in ratios if numbers.number(ratio) is not None]
    if ratios:
        ratio, name = min(ratios, key=lambda pair: pair[0]["value"])
        facts.append(f"{name} has the lowest perplexity, {numbers.write(ratio)} the baseline's")
    less = [e for e in rows if smaller(book, e)]
    if small := min(less, key=lambda e: numbers.number(e.measure("size.disk_bytes")), default=None):
        times = numbers.ratio(book.baseline(small).measure("size.disk_bytes"), small.measure("size.disk_bytes"))
        facts.append(f"{small.name} is the smallest, {times} smaller on disk than the baseline")
    else:
        facts.append("none takes less room on disk than the baseline")
    return f"{'; '.join(facts)}."


def recovery_words(book: Book) -> str:
    """Which share of the lost log-perplexity each trained strategy recovers, against baseline and control."""
    parts = []
    shown = [e.name for family in ("finetuning", "combined") for e in wholes(book, book.of(family=family))]
    for found in (r for r in recoveries(book) if r.entry.name in shown):
        baseline, control = (found.shares["nats", target] for target in ("baseline", "control"))
        if isinstance(baseline, dict):
            words = f"{found.entry.name} recovers {numbers.write(baseline)} of the lost log-perplexity"
            beside = f", {numbers.write(control)} against the control" if isinstance(control, dict) else ""
            parts.append(words + beside)
    return f"{'; '.join(parts)}." if parts else "No recovery can be told yet."


def precision_words(book: Book) -> str:
    """How fast each precision trains, and what it costs against fp32."""
    formats: dict[str, dict[str, dict]] = book.training.record["formats"] if book.training else {}
    parts = []
    for name, measures in formats.items():
        words = f"{name} trains at {numbers.write(measures.get('train.tokens_per_second'), 'value')}"
        ratio = measures.get("quality.perplexity_ratio")
        if name != "fp32" and numbers.number(ratio) is not None:
            words += f" and ends at {numbers.write(ratio)} the perplexity of fp32"
        parts.append(words)
    return f"{'; '.join(parts)}." if parts else "No training precision has been measured yet."


def ablation_words(book: Book) -> str:
    """What leaving out each single pass of the combined recipe costs, the dearest first."""
    singles = [p for group in ablations(book) for p in group if p.ratio and p.missing and "," not in p.missing]
    singles.sort(key=lambda p: -numbers.number(p.ratio))
    costs = [f"without {p.missing}, perplexity is {numbers.write(p.ratio)} that of the whole recipe" for p in singles]
    if not costs:
        return "No combined recipe has been compared with its parts yet."
    return f"W{'; '.join(costs)[1:]}."


def literature_words(book: Book) -> str:
    """How many of the published orders came out here."""
    orders = [compared(book, claim)[2] for claim in PUBLISHED]
    agree, against, unclear = (orders.count(word) for word in ("agrees", "does not agree", numbers.OPEN))
    if not agree + against + unclear:
        return "None of these comparisons has been measured yet."
    return (
        f"Of {_count(agree + against + unclear, 'published order', 'published orders')} that could be checked here, "
        f"{agree} came out the same, {against} the other way round, and {unclear} cannot be told from the intervals."
    )


def failure_words(book: Book) -> str:
    """How many strategies failed, in one sentence."""
    done = sum(not e.failed for e in book.entries)
    if not book.failures:
        return f"Nothing failed: all {_count(done, 'run', 'runs')} finished." if done else "Nothing has been run yet."
    failed = f"{_count(len(book.failures), 'run', 'runs')} of {len(book.entries)} failed"
    return f"{failed}; what is missing for that reason reads “not measured”."
