"""The fastest way torch offers to run the bf16 baseline: a speed-up over a lame baseline is not a speed-up."""

import torch
import torch.nn.functional as F
from torch import nn

from qlib.evaluate.roofline import copies_needed, last_level_cache
from qlib.evaluate.timing import median_interval, time_rounds

__all__ = ["FORMS", "fastest_form", "PlainLinear", "PrepackedLinear", "Float32Linear"]

ROUNDS = 3
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
    """The form that multiplies `rows` rows with `weight` (bf16 `[out, in]`) fastest, and milliseconds of each form.

    At most `PROBE_WEIGHTS` weights are used, in as many copies as it takes to get past the cache.
    """
    weight = weight[: max(1, PROBE_WEIGHTS // weight.shape[1])]
    x = torch.full((rows, weight.shape[1]), 0.5, dtype=torch.bfloat16, device=weight.device)
    copies = copies_needed([2 * weight.numel()] * len(FORMS), last_level_cache(weight.device))
    calls = {}
    for form in FORMS:
        try:
            modules = [form(weight.clone()) for _ in range(copies)]
            modules[0](x)
        except (RuntimeError, NotImplementedError):
            continue  # no such kernel on this device
        calls[form.name] = [lambda module=module: module(x) for module in modules]
    timed = time_rounds(calls, ROUNDS, weight.device, batches=1)
    medians = {name: median_interval(values)[0] for name, values in timed.rounds.items()}
    best = min(medians, key=medians.get)
    return next(form for form in FORMS if form.name == best), medians
