"""What is known of an outside tool without importing it: written in its adapter, read by recipes, report and lesson."""

from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Mapping, NamedTuple

__all__ = ["ANY", "About", "Kind", "about", "adapter", "adapter_name", "tool_names"]

ANY = "any"
FOLDER = Path(__file__).parent / "adapters"


class Kind(NamedTuple):
    """One of a tool's own formats or methods, which fixes the rest.

    Attributes:
        bits, group_size, symmetric: of the codes it stores; `ANY`: the strategy chooses.
        method: how it chooses codes, in the field's words: "RTN", "GPTQ", "AWQ", ...
        activations: bits that activations are rounded to when it runs; None: none.
        reads_text: whether its codes depend on calibration text.
    """

    bits: int | str
    group_size: int | None | str
    symmetric: bool | str
    method: str
    activations: int | None = None
    reads_text: bool = False

    def differs(self, options: Any) -> dict[str, Any]:
        """What a kind needs, if the options of the pass do not have it all."""
        needs = {name: getattr(self, name) for name in ("bits", "group_size", "symmetric")}
        needs = {name: value for name, value in needs.items() if value != ANY}
        return needs if any(getattr(options, name) != value for name, value in needs.items()) else {}


@dataclass(frozen=True)
class About:
    """What an adapter says of its tool.

    Attributes:
        package: what Python imports.
        idea: how the tool works, in a paragraph for somebody who has never used it.
        method: how it chooses codes, where it has no kinds.
        runtime: what computes with its models on a CPU.
        loads: other programs that load what it saves.
        by_hand: what a user must do by hand to install or run it on a machine without a GPU; empty: nothing.
        documentation: address of the page whose recommended settings are used.
        kinds: its own formats or methods, of which a strategy names one; empty: bits, group and symmetry are free.
        takes: those optional settings of the pass that it has: iterations, damp, act_order.
        reads_text: whether its codes depend on calibration text, where it has no kinds.
        beside: other distributions that compute for it, whose versions count.
    """

    package: str
    idea: str
    runtime: str
    documentation: str
    method: str = ""
    loads: tuple[str, ...] = ()
    by_hand: str = ""
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    takes: frozenset[str] = frozenset()
    reads_text: bool = True
    beside: tuple[str, ...] = ()


@lru_cache(maxsize=1)
def tool_names() -> tuple[str, ...]:
    """Tools that have an adapter: `adapters/auto_gptq.py` is the tool auto-gptq."""
    return tuple(sorted(file.stem.replace("_", "-") for file in FOLDER.glob("[!_]*.py")))


def adapter_name(tool: str) -> str:
    """Module of a tool's adapter."""
    return f"qlib.tools.adapters.{tool.replace('-', '_')}"


def adapter(tool: str) -> ModuleType:
    """A tool's adapter; importing it imports nothing of the tool."""
    return import_module(adapter_name(tool))


def about(tool: str) -> About:
    """What is known of a tool."""
    return adapter(tool).ABOUT
