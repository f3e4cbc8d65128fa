"""What a recipe will cost on a model, before it is run: sizes to the byte, memory and time with bands."""

from importlib import import_module
from typing import Any

#: Imported on first use: the command line imports this package, and torch takes seconds.
VERBS = {
    "predict": "qlib.predict.verb",
    "Prediction": "qlib.predict.verb",
    "Estimate": "qlib.predict.verb",
    "this_machine": "qlib.predict.machine",
    "read_machine": "qlib.predict.machine",
}
__all__ = [*VERBS]


def __getattr__(name: str) -> Any:
    if name not in VERBS:
        raise AttributeError(f"module 'qlib.predict' has no attribute '{name}'")
    return getattr(import_module(VERBS[name]), name)
