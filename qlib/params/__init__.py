"""Strategy files: what a row of the report is made of, read from YAML and checked before anything runs."""

from qlib.params.checks import from_dict
from qlib.params.files import check_notebook, expectation, load_strategies, load_strategy, override
from qlib.params.json_schema import schema
from qlib.params.strategy import (
    FAMILIES, PRECISIONS, SHAPES_ONLY, TIERS, TOOL, WITH_FORMATS, WITHOUT_RECIPE,
    Calibration, Evaluation, Strategy, Title, Training, to_dict, tool_of,
)  # fmt: skip

__all__ = [
    "FAMILIES", "PRECISIONS", "SHAPES_ONLY", "TIERS", "TOOL", "WITH_FORMATS", "WITHOUT_RECIPE", "Calibration", "Evaluation",
    "Strategy", "Title", "Training", "check_notebook", "expectation", "from_dict", "load_strategies", "load_strategy",
    "override", "schema", "to_dict", "tool_of",
]  # fmt: skip
