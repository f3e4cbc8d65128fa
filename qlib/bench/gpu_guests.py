"""Linears of other programs that run on a GPU beside ours, where these are installed: torchao and gptqmodel."""

from collections.abc import Callable
from importlib import metadata

import torch
from torch import nn

from qlib.errors import UserError
from qlib.evaluate.fastest import PlainLinear
from qlib.export.gptq import layer_tensors
from qlib.quantize.grid import Grid, fit_grid, round_to_grid

__all__ = ["GUESTS", "form_of"]

Form = Callable[[torch.Tensor, torch.Tensor | None], nn.Module]


def _torchao(config: str, **options) -> Form:
    """Linears as torchao's `quantize_` makes them."""
    from torchao import quantization

    def form(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
        holder = nn.Sequential(PlainLinear(weight, bias))
        quantization.quantize_(holder, getattr(quantization, config)(**options))
        return holder[0]

    return form


def _torchao_fp8() -> Form:
    from torchao.quantization import PerRow

    return _torchao("Float8DynamicActivationFloat8WeightConfig", granularity=PerRow())


def _gptqmodel(module: str, kind: str) -> Form:
    """Linears of gptqmodel, symmetric int4 in groups of 128 (all that Marlin takes), filled with what our export writes."""
    from importlib import import_module

    make, grid = getattr(import_module(f"gptqmodel.nn_modules.qlinear.{module}"), kind), Grid(4, 128, True)

    def form(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
        out_features, in_features = weight.shape
        options = {"bits": 4, "group_size": 128, "desc_act": False, "sym": True, "bias": bias is not None}
        linear = make(**options, in_features=in_features, out_features=out_features, dtype=torch.bfloat16).to(weight.device)
        tensors = layer_tensors(round_to_grid(weight, grid, *fit_grid(weight, grid)))
        if kind == "TritonV2Linear":  # it counts zeros as version 2 of the format does: from 0
            tensors["qzeros"] = tensors["qzeros"] + 0x11111111
        state = {name: tensors[name] for name in dict(linear.named_buffers()) | dict(linear.named_parameters()) if name in tensors}
        for name, tensor in state.items():
            getattr(linear, name).data = tensor.to(weight.device)
        linear.scales.data = linear.scales.data.bfloat16()
        if bias is not None:
            linear.bias.data = bias.clone()
        linear.post_init()
        return linear.eval()

    return form


#: Name -> the program, our format that does the same, and what makes its linears.
GUESTS: dict[str, tuple[str, str, Callable[[], Form]]] = {
    "torchao int4": (
        "torchao", "int4-g128",
        lambda: _torchao("Int4WeightOnlyConfig", group_size=128, int4_packing_format="tile_packed_to_4d"),
    ),
    "torchao int8": ("torchao", "int8", lambda: _torchao("Int8WeightOnlyConfig")),
    "torchao W8A8": ("torchao", "int8-a8", lambda: _torchao("Int8DynamicActivationInt8WeightConfig")),
    "torchao fp8": ("torchao", "fp8-a8", _torchao_fp8),
    "gptqmodel Marlin": ("gptqmodel", "int4-g128", lambda: _gptqmodel("marlin", "MarlinLinear")),
    "gptqmodel Triton": ("gptqmodel", "int4-g128", lambda: _gptqmodel("tritonv2", "TritonV2Linear")),
}  # fmt: skip


def form_of(name: str) -> tuple[Form, str]:
    """What makes the linears of a guest, and the version of its program.

    Raises:
        UserError: the program is not installed, or its kernel cannot be used here.
    """
    program, _, make = GUESTS[name]
    try:
        form, version = make(), f"{program} {metadata.version(program)}"
        weight = torch.linspace(-1, 1, 256 * 512).view(256, 512).bfloat16().cuda()
        x = torch.ones(16, 512, dtype=torch.bfloat16, device="cuda")
        found, wanted = form(weight, None)(x).float(), x.float() @ weight.float().t()
    except Exception as error:  # whatever another program does when it cannot
        raise UserError(f"{name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}") from None
    if not (found - wanted).norm() < 0.2 * wanted.norm():
        raise UserError(f"{name}: its product is off by {(found - wanted).norm() / wanted.norm():.2g} of its size")
    return form, version
