"""Let an outside tool do the work: the strategy then runs inside that tool's own environment (see `qlib.tools`)."""

import json
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from statistics import median
from typing import Any, Literal

from qlib.errors import UserError, nearest
from qlib.tools.about import about, tool_names

__all__ = ["Options", "SCOPE", "apply", "check"]

SCOPE = "model"
CALIBRATES = True
OPTIONAL = ("iterations", "damp", "act_order")


@dataclass(frozen=True)
class Options:
    """Options of the pass that an outside tool does. Null always means: as the tool has it by default.

    Args:
        name: of the tool; `qlib tools install NAME` makes its environment.
        bits: width of a code.
        group_size: input channels that share a scale; null: one scale per output channel.
        symmetric: keep the middle code for zero instead of fitting a zero per group.
        iterations: of an optimisation of the rounding; tools that optimise.
        damp: share of its mean that is added to the diagonal of the Hessian; GPTQ tools only.
        act_order: start with the columns of the largest inputs; GPTQ tools only.
        kind: one of the tool's own formats or methods, which may fix bits, group_size and symmetric.
    """

    name: str = "gptqmodel"
    bits: Literal[2, 3, 4, 8] = 4
    group_size: Literal[16, 32, 64, 128] | None = 128
    symmetric: bool = False
    iterations: int | None = field(default=None, metadata={"minimum": 1})
    damp: float | None = field(default=None, metadata={"minimum": 0})
    act_order: bool | None = None
    kind: str | None = None

    def __post_init__(self) -> None:
        if self.name not in tool_names():
            guess, allowed = nearest(self.name, tool_names()), ", ".join(tool_names())
            raise UserError(f"name: {self.name!r} is no tool{guess}; allowed: {allowed}")
        told = about(self.name)
        for name in OPTIONAL:
            if getattr(self, name) is not None and name not in told.takes:
                raise UserError(f"{name}: is not supported by {self.name}; leave it out")
        if (self.kind is None) == bool(told.kinds) or (self.kind and self.kind not in told.kinds):
            guess = nearest(self.kind, told.kinds) if self.kind and told.kinds else ""
            allowed = ", ".join(told.kinds) or "null"
            raise UserError(f"kind: {self.kind or 'null'} is not allowed for {self.name}{guess}; allowed: {allowed}")
        if self.kind and (wrong := told.kinds[self.kind].differs(self)):
            raise UserError(f"kind: {self.kind} needs {', '.join(f'{n}: {json.dumps(v)}' for n, v in wrong.items())}")

    @property
    def method(self) -> str:
        """How codes are chosen, in the field's words."""
        told = about(self.name)
        return told.kinds[self.kind].method if self.kind else told.method

    @property
    def reads_text(self) -> bool:
        """Whether codes depend on calibration text."""
        told = about(self.name)
        return told.kinds[self.kind].reads_text if self.kind else told.reads_text


def check(subject: Any, options: Options) -> None:
    """Refuse to start outside of the tool's environment.

    Raises:
        UserError: the tool is not here.
    """
    if find_spec(about(options.name).package) is None:
        raise UserError(
            f"name: {options.name} is not in this environment; a strategy of family tool runs in that of the tool, "
            f"which `qlib tools install {options.name}` makes"
        )


def apply(subject: Any, options: Options, context: Any) -> Any:
    """Give the weights of the model's linears the values that the tool chose.

    They stay ordinary linears, in fp32, which holds every value of the tool's format exactly. Where the tool rounds
    activations, too, its own runtime takes the place of the model.

    Raises:
        UserError: the tool does not support a setting.
    """
    import torch

    from qlib.record import Measurement
    from qlib.tools.adapter import facts, put_weights, versions
    from qlib.tools.fairness import compare_runtimes, ids_that_reached, quantize_repeatedly
    from qlib.tools.runtime import RuntimeModel

    folder, ids = subject.source.folder, torch.cat(context.ids)
    same = compare_runtimes(folder, subject.model, ids, options)
    found, runs = quantize_repeatedly(folder, ids, options)
    put_weights(subject.model, found.weights)
    if not found.weights:
        subject = replace(subject, model=RuntimeModel(found.runtime, subject.model))
    size = Measurement(
        found.bits_per_weight,
        "bits",
        method="codes, scales and zeros in the tool's own format",
        conditions="over linears of the blocks",
    )
    sizes = {"size.bits_per_weight": size}
    if found.disk_bytes:
        sizes["size.disk_bytes"] = Measurement(found.disk_bytes, "bytes", 1, method="bytes of the tool's own file")
    seconds = median(run["seconds"] for run in runs)
    told = {"name": options.name, "seconds": seconds, "settings": found.settings}
    told |= {"asked": asdict(options), "versions": versions(options.name), "threads": torch.get_num_threads()}
    told |= {"method": options.method, "runs": runs, "uncompressed": same, "ids": ids_that_reached(found, ids, options)}
    told |= {"facts": facts(options.name), "scored": "weights" if found.weights else "runtime"}
    return replace(
        subject,
        measurements=subject.measurements | sizes,
        details=subject.details | {"tool": told},
    )
