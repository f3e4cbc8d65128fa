"""Check the values of a strategy: each field by its type, and what no single field can tell."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qlib.errors import UserError, nearest
from qlib.options import options_of
from qlib.params.strategy import PRECISIONS, TOOL, WITH_FORMATS, WITHOUT_RECIPE, Strategy, Training, plain
from qlib.recipe import pass_names
from qlib.schema import check, names_of, show

__all__ = ["from_dict", "NAME"]

CACHE = "kv_cache"
NO_TASKS = "through which lm-evaluation-harness does not read; allowed: []"
NAME = re.compile(r"[a-z0-9][a-z0-9._+-]*")


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
    if strategy.evaluation.tasks and CACHE in used:
        problems.append(f"evaluation.tasks: {show(strategy.evaluation.tasks)} is not allowed with pass {CACHE}, {NO_TASKS}")
    if bool(strategy.formats) != (family in WITH_FORMATS):
        *some, last = WITH_FORMATS
        problems.append(f"formats: must be given for families {', '.join(some)} and {last}, and only there")
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


def _check_recipe(recipe: Any) -> tuple[Any, list[str]]:
    """The steps with all their options, and what is wrong with them."""
    if not isinstance(recipe, list) or not recipe:
        return recipe, []  # the type of the field and the family decide
    complete, problems, known = [], [], pass_names()
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
            complete.append({"pass": name} | (plain(asdict(options)) if options else {}))
    return complete, problems
