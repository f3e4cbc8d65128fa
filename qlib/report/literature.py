"""What others published, beside our own figures: orders and ratios that must come out if the code is right.

The numbers below are published ones, with their sources; ours are computed from records.
"""

from dataclasses import dataclass

from qlib.report import numbers
from qlib.report.book import Book, Entry
from qlib.report.html import Cell, Table
from qlib.report.pairs import interval_of, sign, together
from qlib.report.show import table

__all__ = ["Published", "PUBLISHED", "literature_table", "compared"]


@dataclass(frozen=True)
class Published:
    """Two methods that somebody compared.

    Attributes:
        first, second: recipes of one pass, given by the options that matter.
        values: model -> figures of the uncompressed model, of the first and of the second method.
        figure: ``perplexity`` or ``accuracy``.
        about: what was measured, in which setting.
    """

    what: str
    first: dict
    second: dict
    values: dict[str, tuple[float, float, float]]
    figure: str
    about: str
    source: str

    @property
    def ratios(self) -> dict[str, float]:
        """How much the first loses for each unit that the second loses."""
        return {model: (a - none) / (b - none) for model, (none, a, b) in self.values.items()}


GPTQ = "github.com/IST-DASLab/gptq, README"
WANDA = "github.com/locuslab/wanda, README"
AUTOROUND = "github.com/intel/auto-round, docs/paper_acc.md"

PUBLISHED = (
    Published(
        "GPTQ against round-to-nearest, 4 bits",
        {"pass": "gptq", "bits": 4},
        {"pass": "rtn", "bits": 4},
        {"LLaMA-7B": (5.68, 6.09, 6.29), "LLaMA-65B": (3.53, 3.84, 3.92)},
        "perplexity",
        "wikitext-2, one scale per channel; with groups the two come closer",
        GPTQ,
    ),
    Published(
        "GPTQ against round-to-nearest, 3 bits",
        {"pass": "gptq", "bits": 3},
        {"pass": "rtn", "bits": 3},
        {"LLaMA-7B": (5.68, 8.07, 25.54), "LLaMA-65B": (3.53, 5.04, 10.59)},
        "perplexity",
        "wikitext-2, one scale per channel; with groups the two come closer",
        GPTQ,
    ),
    Published(
        "GPTQ against round-to-nearest, 2 bits",
        {"pass": "gptq", "bits": 2},
        {"pass": "rtn", "bits": 2},
        {"Llama-2-7B": (57.98, 35.37, 29.94), "Llama-2-70B": (66.12, 28.47, 38.14)},
        "accuracy",
        "mean of 11 tasks, groups of 128",
        AUTOROUND,
    ),
    Published(
        "Wanda against magnitude, half of the weights",
        {"pass": "wanda", "sparsity": 0.5, "pattern": None},
        {"pass": "magnitude", "sparsity": 0.5, "pattern": None},
        {"Llama-2-7B": (5.12, 6.42, 14.89), "Llama-2-70B": (3.12, 3.98, 4.98)},
        "perplexity",
        "wikitext-2, context 4096",
        WANDA,
    ),
    Published(
        "Wanda, 2 of every 4 against any half",
        {"pass": "wanda", "pattern": "2:4"},
        {"pass": "wanda", "sparsity": 0.5, "pattern": None},
        {"Llama-2-7B": (5.12, 11.02, 6.42), "Llama-2-70B": (3.12, 5.16, 3.98)},
        "perplexity",
        "wikitext-2, context 4096",
        WANDA,
    ),
)


#: What a variant of a method would change; a record from before an option was there lacks it.
PLAIN = {"group_size": 128, "symmetric": False, "element": "int", "clip": "none", "act_order": False}


def _find(book: Book, wanted: dict, model: str | None) -> Entry | None:
    """The strategy whose recipe is one pass with these options and nothing special besides."""
    for entry in book.of(model):
        recipe = entry.params.get("recipe") or []
        if not entry.measurements or len(recipe) != 1 or any(recipe[0].get(k) != v for k, v in wanted.items()):
            continue
        if all(recipe[0].get(k, v) == v for k, v in PLAIN.items()):
            return entry
    return None


def compared(book: Book, claim: Published, model: str | None = None) -> tuple[list[Entry], dict | None, str]:
    """Our two strategies, how much the first loses for each unit the second loses, and whether the order agrees.

    The order is decided by the paired interval of the difference between the two: ``agrees``, ``does not agree``,
    ``not resolved``; where published figures contradict each other, nothing can agree with them.
    """
    pair = [entry for wanted in (claim.first, claim.second) if (entry := _find(book, wanted, model))]
    if len(pair) < 2:
        return pair, None, numbers.ABSENT
    samples = together([book.baseline(pair[0]), *pair])
    if samples is None:
        return pair, None, numbers.ABSENT
    none, first, second = (getattr(sample, claim.figure) for sample in samples)
    documents = samples[0].documents
    loss = 1 if claim.figure == "perplexity" else -1
    more = sign(interval_of(loss * (first - second), "", documents))
    lost = sign(interval_of(loss * (second - none), "", documents))
    ratio = interval_of((first - none) / (second - none), "ratio", documents) if lost > 0 else None
    published = {1 if value > 1 else -1 for value in claim.ratios.values()}
    if len(published) > 1:
        return pair, ratio, "published figures contradict each other"
    return pair, ratio, numbers.OPEN if not more else "agrees" if more in published else "does not agree"


def literature_table(book: Book, model: str | None = None) -> Table:
    """The published ratio of losses, ours, and whether the order of the two methods is the same."""
    rows = []
    for claim in PUBLISHED:
        pair, ratio, order = compared(book, claim, model)
        published = [f"{value:.2f} on {name}" for name, value in claim.ratios.items()]
        names = " against ".join(entry.name for entry in pair) if len(pair) > 1 else ""
        ours = Cell(numbers.write(ratio, "value").removesuffix("×"), (numbers.interval(ratio), names))
        what = "increase of perplexity" if claim.figure == "perplexity" else "loss of accuracy"
        about = Cell(f"{what}; {claim.about}", (claim.source,))
        rows.append([claim.what, Cell(published[0], tuple(published[1:])), ours, order, about])
    subject = model or next(iter(book.models), "the quality subject")
    caption = (
        "What the literature finds, and what was measured here. A ratio is what the first method loses for each unit "
        "that the second loses, both against the uncompressed model. Size of models and data differ, so only the order "
        "is judged: by the paired 95 % interval of the difference of the two."
    )
    columns = ["Comparison", "Published ratio", f"Ours on {subject}", "Order", "Ratio of what"]
    return table(columns, rows, caption, "literature")
