"""Compress, measure and compare Qwen-like language models. The verbs a notebook needs, imported on first use."""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

#: Where each verb lives. The cache key of a strategy follows the imports of the verbs its notebook names.
VERBS = {
    "start": "qlib.notebook",
    "load": "qlib.models.load",
    "compress": "qlib.compress",
    "evaluate": "qlib.evaluate.verb",
    "save": "qlib.models.save",
    "record": "qlib.record",
    "time_formats": "qlib.evaluate.latency",
    "show": "qlib.report.show",
    "show_table": "qlib.report.show",
    "summary": "qlib.report.show",
}
__all__ = [*VERBS, "VERBS", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in VERBS:
        raise AttributeError(f"module 'qlib' has no attribute '{name}'")
    return getattr(import_module(VERBS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """Keeps the verbs: importing the submodule `qlib.compress` would otherwise put it in the place of the function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in VERBS or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
