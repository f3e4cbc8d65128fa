"""Compress, measure and compare Qwen-like language models. The verbs a notebook needs, imported on first use."""

from importlib import import_module
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
