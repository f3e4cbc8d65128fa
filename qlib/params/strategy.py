"""A strategy, one row of the report, as typed values."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from qlib.errors import UserError
from qlib.schema import plain_problem

__all__ = [
    "Strategy", "Title", "Calibration", "Evaluation", "Training", "FAMILIES", "TIERS", "WITHOUT_RECIPE", "WITH_FORMATS",
    "SHAPES_ONLY", "PRECISIONS", "TOOL", "tool_of", "to_dict", "plain",
]  # fmt: skip

FAMILIES = (
    "baseline", "pruning", "weight_quantization", "mixed_precision", "finetuning", "combined", "tool", "speed",
    "training", "scale",
)  # fmt: skip
#: Families that change no weights; all others need a recipe.
WITHOUT_RECIPE = ("baseline", "speed", "training", "scale")
#: Families that measure several number formats side by side.
WITH_FORMATS = ("speed", "training", "scale")
#: Families whose model is the name of a shape: they need neither weights nor texts.
SHAPES_ONLY = ("speed", "scale")
#: What the family "training" may name as formats.
PRECISIONS = ("fp32", "tf32", "bf16", "fp16", "fp16-unscaled", "bf16-pure", "bf16-kahan", "bf16-stochastic")
TIERS = ("smoke", "core", "full", "gpu")
#: The pass that an outside tool does, and the family of strategies that consist of it.
TOOL = "tool"


@dataclass(frozen=True)
class Title:
    """What the report calls a strategy.

    Args:
        en: in English.
        zh: in Chinese.
    """

    en: str
    zh: str


@dataclass(frozen=True)
class Calibration:
    """Text that the passes may look at.

    Args:
        text: "reference" for the calibration split of the shipped corpus, or a text file or folder.
        samples: number of windows.
        length: tokens of a window.
    """

    text: str = "reference"
    samples: int = field(default=128, metadata={"minimum": 1})
    length: int = field(default=256, metadata={"minimum": 2})


@dataclass(frozen=True)
class Evaluation:
    """What quality is measured on.

    Args:
        text: "reference" for the evaluation split of the shipped corpus, or a text file or folder.
        documents: number of documents; null: all.
        length: context length in tokens.
        items: number of multiple-choice items; null: all.
        tasks: tasks of the hub by name, through lm-evaluation-harness.
        task_limit: items of each of these tasks; null: all.
        bootstrap: resamples behind an interval.
    """

    text: str = "reference"
    documents: int | None = field(default=None, metadata={"minimum": 1})
    length: int = field(default=256, metadata={"minimum": 2})
    items: int | None = field(default=3072, metadata={"minimum": 1})
    tasks: list[str] = field(default_factory=list)
    task_limit: int | None = field(default=None, metadata={"minimum": 1})
    bootstrap: int = field(default=1000, metadata={"minimum": 1})


@dataclass(frozen=True)
class Training:
    """How a model is trained from random weights, once in each precision.

    Args:
        tokens: of a run.
        length: tokens of a sequence.
        batch_tokens: tokens of a step.
        peak_lr: peak learning rate of AdamW.
        seeds: runs of each precision; they differ in weights and order of batches.
        fp16_steps: steps after which fp16 ends on a CPU, which has no fast path for it.
    """

    tokens: int = field(default=200_000, metadata={"minimum": 1})
    length: int = field(default=128, metadata={"minimum": 2})
    batch_tokens: int = field(default=512, metadata={"minimum": 2})
    peak_lr: float = field(default=2e-3, metadata={"minimum": 0})
    seeds: int = field(default=1, metadata={"minimum": 1})
    fp16_steps: int = field(default=100, metadata={"minimum": 1})


@dataclass(frozen=True)
class Strategy:
    """One row of the report.

    Args:
        name: unique; also the name of its folder.
        title: what the report calls it.
        family: decides which measurements the record must hold.
        tier: how often it runs: smoke (every change), core (make report), full (make report-full), gpu (only if asked for).
        notebook: file in notebooks/ that is executed.
        model: "reference-2", a folder, a hub id, or for the families speed and scale the name of a shape.
        recipe: the passes in order, each {pass: NAME, option: value, ...}.
        seed: of everything random.
        calibration: text that the passes may look at.
        evaluation: what quality is measured on.
        formats: speed, scale and training only: the number formats that are measured side by side.
        prompt_tokens: speed and scale only: length of the prompt that is prefilled.
        context_tokens: speed and scale only: length of the context at which a token is decoded.
        rounds: speed and scale only: interleaved rounds; each times every format once.
        training: training only: how the model is trained in each of the formats.
    """

    name: str
    title: Title
    family: Literal[FAMILIES]  # type: ignore[valid-type]
    tier: Literal[TIERS]  # type: ignore[valid-type]
    notebook: str
    model: str = "reference-2"
    recipe: list[dict[str, Any]] = field(default_factory=list)
    seed: int = field(default=0, metadata={"minimum": 0})
    calibration: Calibration = Calibration()
    evaluation: Evaluation = Evaluation()
    formats: list[str] = field(default_factory=list)
    prompt_tokens: int = field(default=256, metadata={"minimum": 1})
    context_tokens: int = field(default=256, metadata={"minimum": 1})
    rounds: int = field(default=10, metadata={"minimum": 1})
    training: Training = Training()


def tool_of(strategy: Strategy) -> str | None:
    """The outside tool in whose environment a strategy runs, None for this one."""
    return next((step["name"] for step in strategy.recipe if step["pass"] == TOOL), None)


def to_dict(strategy: Strategy) -> dict[str, Any]:
    """The strategy as plain values that survive JSON and papermill."""
    values = plain(asdict(strategy))
    problem = plain_problem(values)
    if problem:
        raise UserError(f"{strategy.name}: {problem}")
    return values


def plain(value: Any) -> Any:
    """A value with lists in place of tuples, all the way down."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value
