"""Let an outside tool do the work: the strategy then runs inside that tool's own environment (see `qlib.tools`)."""

from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

from qlib.errors import UserError

__all__ = ["ADAPTERS", "Options", "SCOPE", "adapter_of", "apply", "check"]

SCOPE = "model"
CALIBRATES = True

#: Tools with an adapter: what each is called, and the package it is.
ADAPTERS = {
    "auto-gptq": "auto_gptq",
    "gptqmodel": "gptqmodel",
    "auto-round": "auto_round",
    "llm-compressor": "llmcompressor",
    "llama-cpp": "llama_cpp",
}
NAMES = tuple(ADAPTERS)
#: Types of llama.cpp, and their bits, group and symmetry. Its others need rows that are multiples of 256.
KINDS = {"Q8_0": (8, 32, True), "Q4_0": (4, 32, True), "IQ4_NL": (4, 32, True), "Q2_0": (2, 64, True)}
KIND_NAMES = tuple(KINDS)


@dataclass(frozen=True)
class Options:
    """Options of the pass that an outside tool does. Null always means: as the tool has it by default.

    Args:
        name: of the tool; `qlib tools install NAME` makes its environment.
        bits: width of a code.
        group_size: input channels that share a scale; null: one scale per output channel.
        symmetric: keep the middle code for zero instead of fitting a zero per group.
        iterations: of the rounding optimisation on each block; auto-round only.
        damp: share of its mean that is added to the diagonal of the Hessian; GPTQ tools only.
        act_order: start with the columns of the largest inputs; GPTQ tools only.
        kind: llama.cpp's type, which fixes bits, group_size and symmetric; llama-cpp only.
    """

    name: Literal[NAMES] = "gptqmodel"  # type: ignore[valid-type]
    bits: Literal[2, 3, 4, 8] = 4
    group_size: Literal[32, 64, 128] | None = 128
    symmetric: bool = False
    iterations: int | None = field(default=None, metadata={"minimum": 1})
    damp: float | None = field(default=None, metadata={"minimum": 0})
    act_order: bool | None = None
    kind: Literal[KIND_NAMES] | None = None  # type: ignore[valid-type]

    def __post_init__(self) -> None:
        if (self.kind is None) == (self.name == "llama-cpp"):
            allowed = ", ".join(KINDS) if self.kind is None else "null"
            raise UserError(f"kind: {self.kind or 'null'} is not allowed for {self.name}; allowed: {allowed}")
        if self.kind and KINDS[self.kind] != (self.bits, self.group_size, self.symmetric):
            bits, size, _ = KINDS[self.kind]
            raise UserError(f"kind: {self.kind} needs bits: {bits}, group_size: {size}, symmetric: true")


def adapter_of(name: str) -> str:
    """Module of a tool's adapter, which can only be imported where the tool is."""
    return f"qlib.tools.{name.replace('-', '_')}"


def check(subject: Any, options: Options) -> None:
    """Refuse to start outside of the tool's environment.

    Raises:
        UserError: the tool is not here.
    """
    if find_spec(ADAPTERS[options.name]) is None:
        raise UserError(
            f"name: {options.name} is not in this environment; a strategy of family tool runs in that of the tool, "
            f"which `qlib tools install {options.name}` makes"
        )


def apply(subject: Any, options: Options, context: Any) -> Any:
    """Give the weights of the model's linears the values that the tool chose.

    They stay ordinary linears, in fp32, which holds every value of the tool's format exactly.

    Raises:
        UserError: the tool does not support a setting.
    """
    import torch

    from qlib.record import Measurement
    from qlib.tools.adapter import put_weights, versions

    found = import_module(adapter_of(options.name)).quantize(subject.source.folder, torch.cat(context.ids), options)
    put_weights(subject.model, found.weights)
    size = Measurement(
        found.bits_per_weight,
        "bits",
        method="codes, scales and zeros in the tool's own format",
        conditions="over linears of the blocks",
    )
    sizes = {"size.bits_per_weight": size}
    if found.disk_bytes:
        sizes["size.disk_bytes"] = Measurement(found.disk_bytes, "bytes", 1, method="bytes of the tool's own file")
    told = {"name": options.name, "seconds": found.seconds, "settings": found.settings}
    told |= {"asked": asdict(options), "versions": versions(options.name)}
    return replace(
        subject,
        measurements=subject.measurements | sizes,
        details=subject.details | {"tool": told},
    )
