"""Strategy files: what a row of the report is made of, read from YAML and checked before anything runs."""

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Iterable, Literal

from qlib.errors import UserError, nearest
from qlib.options import options_of
from qlib.paths import find_root
from qlib.schema import check, describe, names_of, plain_problem, show
from qlib.yamltext import read_yaml, shown

__all__ = [
    "Strategy", "Title", "Calibration", "Evaluation", "Training", "FAMILIES", "TIERS", "WITHOUT_RECIPE",
    "TOOL", "tool_of", "load_strategy", "load_strategies", "check_notebook", "from_dict", "to_dict", "override",
    "expectation", "schema",
]  # fmt: skip

FAMILIES = (
    "baseline", "pruning", "weight_quantization", "mixed_precision", "finetuning", "combined", "tool", "speed",
    "training",
)  # fmt: skip
#: Families that change no weights; all others need a recipe.
WITHOUT_RECIPE = ("baseline", "speed", "training")
#: Families that measure several number formats side by side.
WITH_FORMATS = ("speed", "training")
#: What the family "training" may name as formats.
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
TIERS = ("smoke", "core", "full")
#: The pass that an outside tool does, and the family of strategies that consist of it.
TOOL = "tool"
NAME = re.compile(r"[a-z0-9][a-z0-9._+-]*")


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
        tier: how often it runs: smoke (every change), core (make report), full (make report-full).
        notebook: file in notebooks/ that is executed.
        model: "reference-2", a folder, a hub id, or for the speed family the name of a shape.
        recipe: the passes in order, each {pass: NAME, option: value, ...}.
        seed: of everything random.
        calibration: text that the passes may look at.
        evaluation: what quality is measured on.
        formats: speed and training only: the number formats that are measured side by side.
        prompt_tokens: speed only: length of the prompt that is prefilled.
        context_tokens: speed only: length of the context at which a token is decoded.
        rounds: speed only: interleaved rounds; each times every format once.
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


def load_strategy(path: Path | str, root: Path | None = None) -> Strategy:
    """Read and check one strategy file.

    Raises:
        UserError: one line per problem: file, field, value, what is allowed.
    """
    path = Path(path)
    strategy = from_dict(read_yaml(path), shown(path))
    check_notebook(strategy, root or _root_of(path), shown(path))
    return strategy


def check_notebook(strategy: Strategy, root: Path, where: str) -> None:
    """Make sure that the notebook of a strategy is there.

    Raises:
        UserError: it is not in notebooks/.
    """
    notebooks = root / "notebooks"
    if not (notebooks / strategy.notebook).is_file():
        known = sorted(file.name for file in notebooks.glob("*.ipynb"))
        raise UserError(
            f"{where}: notebook: '{strategy.notebook}' is not in notebooks/"
            f"{nearest(strategy.notebook, known)}; allowed: {', '.join(known) or 'none is there'}"
        )


def load_strategies(paths: Iterable[Path | str], root: Path | None = None) -> list[Strategy]:
    """Read several strategy files, in their order.

    Raises:
        UserError: as `load_strategy`, for all files together; or two files give the same name.
    """
    strategies, problems, seen = [], [], {}
    for path in paths:
        try:
            strategy = load_strategy(path, root)
        except UserError as error:
            problems.append(str(error))
            continue
        if strategy.name in seen:
            problems.append(f"{shown(Path(path))}: name: '{strategy.name}' is already used by {seen[strategy.name]}")
        seen[strategy.name] = shown(Path(path))
        strategies.append(strategy)
    if problems:
        raise UserError("\n".join(problems))
    return strategies


def _root_of(path: Path) -> Path:
    try:
        return find_root(path.resolve().parent)
    except UserError:
        return find_root()


def from_dict(values: Any, where: str) -> Strategy:
    """Check plain values and build a strategy; options of passes are completed with their defaults.

    Raises:
        UserError: one line per problem, each beginning with `where`.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where}: is not a mapping of fields; allowed: {', '.join(names_of(Strategy))}")
    recipe, problems = _check_recipe(values.get("recipe", []))
    strategy, found = check(Strategy, values | {"recipe": recipe})
    problems = found + problems
    if not problems:
        problems = _check_family(strategy)
    if problems:
        raise UserError("\n".join(f"{where}: {line}" for line in problems))
    return strategy


def _check_family(strategy: Strategy) -> list[str]:
    """What no single field can tell."""
    problems, family = [], strategy.family
    if not NAME.fullmatch(strategy.name):
        problems.append(f"name: '{strategy.name}' is not allowed; allowed: lower-case letters, digits and . _ + -")
    if Path(strategy.notebook).name != strategy.notebook or not strategy.notebook.endswith(".ipynb"):
        problems.append(f"notebook: '{strategy.notebook}' is not allowed; allowed: the name of a file in notebooks/")
    if not strategy.recipe and family not in WITHOUT_RECIPE:
        problems.append(f"recipe: is empty; allowed for family {family}: at least one pass, e.g. [{{pass: rtn}}]")
    used = [step["pass"] for step in strategy.recipe]
    if family == TOOL and used and used != [TOOL]:
        problems.append(f"recipe: {', '.join(used)} is not allowed for family {TOOL}; allowed: {{pass: {TOOL}}} alone")
    if family != TOOL and TOOL in used:
        problems.append(f"recipe: pass {TOOL} is not allowed for family {family}; allowed for family {TOOL} only")
    if strategy.recipe and family in WITHOUT_RECIPE:
        problems.append(f"recipe: is not empty; family {family} changes no weights")
    if bool(strategy.formats) != (family in WITH_FORMATS):
        problems.append(f"formats: must be given for families {' and '.join(WITH_FORMATS)}, and only there")
    elif family == "training":
        problems += _check_training(strategy.formats, strategy.training)
    return problems


def _check_training(formats: list[str], training: Training) -> list[str]:
    """What does not fit together in a comparison of precisions."""
    choices = ", ".join(PRECISIONS)
    problems = [
        f"formats: '{one}' is not allowed{nearest(one, PRECISIONS)}; allowed: {choices}"
        for one in formats
        if one not in PRECISIONS
    ]
    if not problems and (PRECISIONS[0] not in formats or len(set(formats)) < len(formats)):
        problems.append(f"formats: {show(formats)} is not allowed; allowed: fp32 and others of {choices}, each once")
    if training.batch_tokens < training.length:
        problems.append(
            f"training.batch_tokens: {training.batch_tokens} is not allowed; allowed: at least one sequence, "
            f"{training.length}"
        )
    return problems


def pass_modules() -> dict[str, str]:
    """Name of every pass and the module it lives in."""
    from qlib.recipe import pass_names

    return pass_names()


def _check_recipe(recipe: Any) -> tuple[Any, list[str]]:
    """The steps with all their options, and what is wrong with them."""
    if not isinstance(recipe, list) or not recipe:
        return recipe, []  # the type of the field and the family decide
    complete, problems, known = [], [], pass_modules()
    for index, step in enumerate(recipe):
        at = f"recipe[{index}]"
        name = step.get("pass") if isinstance(step, dict) else None
        if not isinstance(step, dict) or "pass" not in step:
            problems.append(f"{at}: {show(step)} is not allowed; allowed: a mapping with 'pass', e.g. {{pass: rtn}}")
        elif not isinstance(name, str) or name not in known:
            close = nearest(str(name), known)
            problems.append(f"{at}.pass: {show(name)} is unknown{close}; allowed: {', '.join(known)}")
        else:
            kind, hints = options_of(known[name])
            given = {key: value for key, value in step.items() if key != "pass"}
            options, found = check(kind, given, f"{at}.", hints)
            problems += found
            complete.append({"pass": name} | (_plain(asdict(options)) if options else {}))
    return complete, problems


def to_dict(strategy: Strategy) -> dict[str, Any]:
    """The strategy as plain values that survive JSON and papermill."""
    values = _plain(asdict(strategy))
    problem = plain_problem(values)
    if problem:
        raise UserError(f"{strategy.name}: {problem}")
    return values


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def override(strategy: Strategy, changes: dict[str, Any], where: str = "-p") -> Strategy:
    """A copy with other values; a key may go into the depth: ``evaluation.items``, ``recipe.0.bits``.

    Raises:
        UserError: unknown key, or a value that is not allowed.
    """
    values = to_dict(strategy)
    for key, value in changes.items():
        *folders, last = re.sub(r"\[(\d+)\]", r".\1", key).split(".")
        inner: Any = values
        for depth, step in enumerate([*folders, last]):
            known = [str(i) for i in range(len(inner))] if isinstance(inner, list) else inner
            if not isinstance(inner, (dict, list)):
                raise UserError(f"{where} {key}: {show(inner)} has no fields of its own")
            if step not in known and (isinstance(inner, list) or depth < len(folders) or depth == 0):
                close = nearest(step, known)
                raise UserError(f"{where} {key}: '{step}' is unknown{close}; allowed: {', '.join(known)}")
            if depth < len(folders):
                inner = inner[int(step)] if isinstance(inner, list) else inner[step]
        inner[int(last) if isinstance(inner, list) else last] = value
    return from_dict(values, where)


def expectation(path: Path) -> str:
    """The first comment of a strategy file: what to expect, on what machine, in what time."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    comments = [line.lstrip("# ").strip() for line in lines[:3] if line.startswith("#")]
    return next((line for line in comments if line and not line.startswith("yaml-language-server")), "")


def schema() -> dict[str, Any]:
    """JSON Schema of a strategy file, for editors: from the dataclasses above and the options of every pass."""
    passes = {}
    for name, module in sorted(pass_modules().items()):
        kind, hints = options_of(module)
        entry = describe(kind, hints)
        named = {"pass": {"const": name, "title": "pass", "description": entry.get("description", "")}}
        required = ["pass", *entry.get("required", [])]
        passes[name] = entry | {"title": name, "properties": named | entry["properties"], "required": required}
    whole = describe(Strategy)
    choices = [{"$ref": f"#/$defs/{name}"} for name in passes]
    whole["properties"]["recipe"]["items"] = {"oneOf": choices} if choices else False
    whole["properties"]["name"]["pattern"] = f"^{NAME.pattern}$"
    bare = {"properties": {"family": {"enum": list(WITHOUT_RECIPE)}}}
    needs_recipe = {"required": ["recipe"], "properties": {"recipe": {"minItems": 1}}}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Strategy",
        **whole,
        "if": bare,
        "then": {"properties": {"recipe": {"maxItems": 0}}},
        "else": needs_recipe,
        "$defs": passes,
    }
