"""What the record of a true shape depends on: every method that is tried, and no text."""

from pathlib import Path

from qlib.params import load_strategy
from qlib.runs.key import key_parts
from qlib.scale.methods import METHODS

ROOT = Path(__file__).parents[2]


def test_the_key_holds_every_method_and_neither_weights_nor_texts():
    parts = key_parts(load_strategy(ROOT / "params" / "scale-72b.yaml"), ROOT)
    used = {step["pass"] for method in METHODS.values() for step in method.recipe}
    sources = {name.rpartition(".")[2] for name in parts["sources"]}
    assert used | {"layer", "check", "sizes", "extrapolate", "latency", "compress"} <= sources
    assert (parts["model"], parts["data"]) == ("qwen-72b", {})


def test_other_strategies_do_not_depend_on_it():
    parts = key_parts(load_strategy(ROOT / "params" / "gptq-int4.yaml"), ROOT)
    assert not [name for name in parts["sources"] if name.startswith(("qlib.scale", "qlib.bench"))]
