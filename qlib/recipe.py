"""Find passes by name: a pass is the module of its name, with typed `Options` and one `SCOPE`.

By scope, a pass has the function
- `linear`: ``solve(weight, options, mask=None, statistic=None)`` and, if it feeds on data, the class
  ``Statistic(width, options)`` with ``feed(inputs [tokens, in])`` and ``free()``; returns a `CompressedWeight` or a
  `PrunedWeight`. ``feeds(options)``, where there is one, says whether these options need data at all. With
  ``TOGETHER = True`` linears that read the same inputs are solved as one weight, where a plan gives them the same options;
- `block`: ``apply(block, options, context)``: changes the weights of a block in place (``PREPARES = True``: for a later
  pass that puts them on a grid), or puts packed layers into the places of its linears. ``TARGETS = True`` asks for what
  the uncompressed model makes of the same text;
- `plan`: ``plan(subject, options, context)``; changes nothing and returns options for later passes by linear;
- `model`: ``apply(subject, options, context)``; changes the model in place and returns the subject.
Block, plan and model passes that read calibration windows say so with ``CALIBRATES = True``, and with ``feeds(options)``
if not all options do. Any pass may have
``check(subject, options)``, which refuses what cannot work before anything is changed; a plan pass ``streams(options)``,
which says whether it can plan for a model of which one block at a time is in memory (`qlib.stream`).
"""

from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from qlib.errors import UserError, nearest

__all__ = ["SCOPES", "Context", "BlockContext", "pass_names", "find_pass", "pass_name", "read_recipe"]

#: What a pass works on, and how it is called: see `qlib.compress`.
SCOPES = ("linear", "block", "plan", "model")
FOLDERS = ("quantize", "prune", "transforms", "train")


@dataclass(frozen=True)
class Context:
    """What a plan or model pass may use besides the subject.

    Attributes:
        ids: calibration windows, token ids `[rows, length]` of each batch; empty if no pass reads any.
        seed: of everything random.
    """

    ids: list[Any]
    seed: int = 0


@dataclass(frozen=True)
class BlockContext:
    """What a block pass may use besides the block.

    Attributes:
        index: number of the block. path: of the block in the model, e.g. ``model.layers.3``.
        groups: names of the linears, those that read the same input together, in the order they run.
        inputs: what reaches the block in the model compressed so far: hidden states `[rows, tokens, hidden]` and keyword
            arguments of each batch (see `qlib.walk`).
        targets: of each batch, what the uncompressed model hands to the next block `[rows, tokens, hidden]`; None unless
            the pass has ``TARGETS = True``.
        rounding: options of the pass that puts each linear on a grid, by name: a later one, or this one (then with what
            a plan pass chose for the linear).
        config: of the model. seed: of everything random.
    """

    index: int
    path: str
    groups: tuple[tuple[str, ...], ...]
    inputs: list[Any]
    targets: list[Any] | None
    rounding: dict[str, Any]
    config: Any
    seed: int = 0


@lru_cache(maxsize=1)
def pass_names() -> dict[str, str]:
    """Map the name of every pass to its module, without importing any.

    A pass is told from a helper module by the line that sets its scope.
    """
    found = {}
    for folder in FOLDERS:
        for file in sorted((Path(__file__).parent / folder).glob("*.py")):
            if any(line.startswith("SCOPE = ") for line in file.read_text(encoding="utf-8").splitlines()):
                found[file.stem] = f"qlib.{folder}.{file.stem}"
    return found


def find_pass(name: str) -> ModuleType:
    """Import the module of a pass.

    Raises:
        UserError: no pass has that name.
    """
    known = pass_names()
    if name not in known:
        raise UserError(f"pass '{name}' is unknown{nearest(name, known)}; allowed: {', '.join(known)}")
    return import_module(known[name])


def pass_name(module: ModuleType) -> str:
    """What recipes call a pass."""
    return module.__name__.rpartition(".")[2]


def read_recipe(recipe: list[dict[str, Any]]) -> list[tuple[ModuleType, Any]]:
    """Turn ``[{"pass": "rtn", "bits": 4}]`` into pairs of a pass module and its typed options.

    Raises:
        UserError: an empty recipe, a step without a pass, an unknown pass or option.
    """
    if not recipe:
        raise UserError("recipe: is empty; give at least one pass, e.g. [{pass: rtn, bits: 4}]")
    steps = []
    for index, step in enumerate(recipe):
        options = {key: value for key, value in step.items() if key != "pass"}
        if "pass" not in step:
            raise UserError(f"recipe[{index}]: has no 'pass'; allowed: {', '.join(pass_names())}")
        module = find_pass(step["pass"])
        known = module.Options.__dataclass_fields__
        for key in options:
            if key not in known:
                raise UserError(
                    f"recipe[{index}].{key}: unknown option of pass '{step['pass']}'{nearest(key, known)}; "
                    f"allowed: {', '.join(known)}"
                )
        try:
            steps.append((module, module.Options(**options)))
        except UserError as error:
            raise UserError(f"recipe[{index}].{error}") from None
    return steps
