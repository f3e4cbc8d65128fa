"""The fastest way torch offers to run the bf16 baseline: a speed-up over a lame baseline is not a speed-up."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from qlib.evaluate.roofline import copies_needed, last_level_cache
from qlib.evaluate.timing import median_interval, time_rounds

__all__ = ["FORMS", "compare_forms", "fastest_form", "PlainLinear", "PrepackedLinear", "Float32Linear"]

ROUNDS, SHARE = 3, 8  # rounds, and copies that one of them uses
#: Weights of the linear that the forms are compared on, at most.
PROBE_WEIGHTS = 2**25


class PlainLinear(nn.Linear):
    """`nn.Linear` on a bf16 weight."""

    name = "bf16, F.linear"

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)


class PrepackedLinear(nn.Module):
    """The weight re-ordered once for oneDNN's bf16 kernels, as torch.compile's freezing does it."""

    name = "bf16, prepacked for oneDNN"

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self.bias = bias

    def __deepcopy__(self, memo: dict) -> "PrepackedLinear":
        twin = PrepackedLinear.__new__(PrepackedLinear)
        nn.Module.__init__(twin)
        twin.weight, twin.bias = self.weight.clone(), None if self.bias is None else self.bias.clone()
        return twin

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class Float32Linear(nn.Module):
    """The same values in fp32: twice the bytes, and the fastest kernels on processors without bf16."""

    name = "fp32, F.linear"

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.weight, self.bias = weight.float(), None if bias is None else bias.float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.float(), self.weight, self.bias).to(x.dtype)


#: The forms that are tried. Not among them: half precision, which has no fast path on CPUs, and torch.compile, which
#: would take Python's overhead off packed layers as well, and would have to compile every copy for itself.
FORMS = (PlainLinear, PrepackedLinear, Float32Linear)


def fastest_form(weight: torch.Tensor, rows: int) -> tuple[type[nn.Module], dict[str, float]]:
    """The form that multiplies `rows` rows with `weight` (bf16 `[out, in]`) fastest, and milliseconds of each form."""
    return compare_forms(weight, [rows])[0]


def compare_forms(weight: torch.Tensor, rows: Sequence[int]) -> list[tuple[type[nn.Module], dict[str, float]]]:
    """`fastest_form` for several numbers of rows, with the same copies of the weight.

    At most `PROBE_WEIGHTS` weights are used, in as many copies as it takes to get past the cache.
    """
    weight = weight[: max(1, PROBE_WEIGHTS // weight.shape[1])]
    inputs = [torch.full((count, weight.shape[1]), 0.5, dtype=torch.bfloat16, device=weight.device) for count in rows]
    copies = copies_needed([2 * weight.numel()] * len(FORMS), last_level_cache(weight.device))
    held = {}
    for form in FORMS:
        try:
            modules = [form(weight.clone()) for _ in range(copies)]
            modules[0](inputs[0])
        except (RuntimeError, NotImplementedError):
            continue  # no such kernel on this device
        held[form] = modules
    return [_fastest(held, x) for x in inputs]


def _fastest(held: dict[type[nn.Module], list[nn.Module]], x: torch.Tensor) -> tuple[type[nn.Module], dict[str, float]]:
    calls = {form.name: [partial(module, x) for module in modules] for form, modules in held.items()}
    timed = time_rounds(calls, ROUNDS, x.device, batches=1, share=SHARE)
    medians = {name: median_interval(values)[0] for name, values in timed.rounds.items()}
    return next(form for form in held if form.name == min(medians, key=medians.get)), medians
